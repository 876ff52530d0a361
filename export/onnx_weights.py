"""The tensors of a checkpoint as graphs want them, each checked against the manifest when read.

A checkpoint that nvvl quantized says in ``manifest.json`` what every tensor's bytes hash to; one
that does not hold them any more is refused in the middle of the export rather than built into an
engine. A BF16 checkpoint's is not read: the hashes of what was read go into that of the graphs.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nvvl.errors import CheckpointError, describe_misfit
from nvvl.export.hash_proof import HashProof
from nvvl.export.onnx_graph import TORCH_DTYPES, GraphDtype
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.load import check_tensors, expected_tensors
from nvvl.model.safetensors_io import tensor_bytes
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.declared import check_quantized_tensors, is_quantized, read_formats
from nvvl.quantize.linear import QuantizedLinear
from nvvl.quantize.recipe import Format
from nvvl.staging import MANIFEST_NAME

# Tensors that graphs read with `CheckpointWeights.float`, in float32 whatever the graph's dtype.
_FLOAT_IN_GRAPHS = re.compile(r"(\.norm|\.norm_f|mlp1\.0)\.weight$|\.(A_log|D|dt_bias|pos_embed)$")


class CheckpointWeights:
    """Reads tensors by name, checks their hashes and converts them.

    Attributes:
        checkpoint: Where they lie.
        dtype: The graph's.
        formats: Format of each linear that is not ``bf16``.
        sha256: Of every tensor read so far.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: GraphDtype) -> None:
        """Read headers, formats and manifest.

        Raises:
            CheckpointError: if tensors are missing, unexpected or of another shape; if the
                checkpoint is quantized and has no manifest, or another list of tensors than its
                manifest, or declares other formats than it has.
        """
        self.checkpoint = checkpoint
        self.dtype: GraphDtype = dtype
        self.formats: dict[str, Format] = {}
        self.sha256: dict[str, str] = {}
        self._recorded: Mapping[str, str] | None = None
        self._made: dict[str, Tensor] = {}
        if is_quantized(checkpoint):
            self.formats = read_formats(checkpoint)
            check_quantized_tensors(checkpoint, self.formats)
            recorded = read_hashes(checkpoint.folder).tensors
            self._recorded = {name: sha256 for name, (sha256, _, _) in recorded.items()}
            _require_same_names(checkpoint, self._recorded)
        else:
            check_tensors(checkpoint, expected_tensors(checkpoint.config))

    def format_of(self, fqn: str) -> Format:
        """Return the format of a linear."""
        return self.formats.get(fqn, "bf16")

    def replace_linear(self, fqn: str, linear_format: Format, parts: Mapping[str, Tensor]) -> None:
        """Use other tensors for a linear than the checkpoint's, by leaf name."""
        self.formats[fqn] = linear_format
        self._made |= {f"{fqn}.{leaf}": tensor for leaf, tensor in parts.items()}

    def stored(self, name: str) -> Tensor:
        """Return a tensor as it is stored.

        Raises:
            CheckpointError: if its bytes are not those the manifest was made of.
        """
        if name in self._made:
            return self._made[name]
        tensor = self.checkpoint.load(name)
        digest = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        if self._recorded is not None and digest != self._recorded[name]:
            folder = self.checkpoint.folder
            raise CheckpointError(
                f"{folder}: {name}: bytes changed since the checkpoint was written; quantize it "
                f"again, and see: nvvl verify {shlex.quote(str(folder))}"
            )
        self.sha256[name] = digest
        return tensor

    def graph(self, name: str) -> Tensor:
        """Return a 16-bit or float tensor in the graph's dtype."""
        return self.stored(name).to(TORCH_DTYPES[self.dtype])

    def float(self, name: str) -> Tensor:
        """Return a tensor in float32."""
        return self.stored(name).float()

    def scale(self, name: str) -> Tensor:
        """Return a scale as a float32 scalar."""
        return self.stored(name).to(torch.float32).reshape(())


def round_as_graphs(model: NemotronNanoVL, dtype: GraphDtype) -> None:
    """Give a float32 model the values that graphs of a dtype have, in place.

    A checkpoint may be wider than its graphs, whose rounded values are then the ones to run with.
    """
    quantized = {name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            if module in quantized and leaf != "bias":
                continue
            if not _FLOAT_IN_GRAPHS.search(name):
                parameter.copy_(parameter.to(TORCH_DTYPES[dtype]))


def read_hashes(folder: Path) -> HashProof:
    """Read the hashes that a checkpoint's manifest records.

    Raises:
        CheckpointError: if there is no manifest, or it is not one of nvvl.
    """
    path = folder / MANIFEST_NAME
    try:
        return HashProof.from_manifest(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); required a quantized checkpoint that "
            "nvvl wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a manifest of nvvl ({describe_misfit(error)})"
        ) from None


def _require_same_names(checkpoint: Checkpoint, recorded: Mapping[str, str]) -> None:
    differ = sorted(checkpoint.tensors.keys() ^ recorded.keys())
    if differ:
        raise CheckpointError(
            f"{checkpoint.folder}: manifest.json and weights name different tensors: "
            f"{', '.join(differ[:6])}; quantize it again"
        )
