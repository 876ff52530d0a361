"""The model that others are measured against, which must be the BF16 one."""

from pathlib import Path

from nvvl.errors import CheckpointError
from nvvl.quantize.declared import is_quantized, open_checkpoint


def require_bf16(teacher: Path) -> None:
    """Refuse a quantized checkpoint, whose own loss no KL to it would show.

    Raises:
        ConfigError, CheckpointError: if it is quantized, or cannot be opened.
    """
    if is_quantized(open_checkpoint(teacher)):
        raise CheckpointError(
            f"{teacher}: is quantized; the teacher must be the BF16 checkpoint that the models "
            "were made from"
        )
