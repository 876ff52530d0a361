"""The optional libraries of ONNX graphs, asked for before any work is done."""

from importlib.util import find_spec

from nvvl.errors import HardwareError


def require_onnx(*, runtime: bool = False) -> None:
    """Refuse if the extra ``nvvl[onnx]`` is not installed.

    Args:
        runtime: whether onnxruntime is needed too, to run graphs.

    Raises:
        HardwareError: naming what is missing and how to install it.
    """
    wanted = ["onnx", "onnxruntime"] if runtime else ["onnx"]
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise HardwareError(
            f"ONNX graphs need {' and '.join(missing)}, which is not installed; install it with: "
            "pip install 'nvvl[onnx]'"
        )
