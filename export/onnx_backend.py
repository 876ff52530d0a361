"""Opens graphs for ``nvvl chat --backend onnx``.

Of a folder that ``nvvl export onnx`` wrote, whose files must have the hashes of its manifest; or of
a checkpoint, whose graphs are then made in a temporary folder, in float32 and with a growing cache.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nvvl.errors import EngineError
from nvvl.export.onnx_export import export_onnx, file_faults
from nvvl.export.onnx_io import IO_NAME
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.export.onnx_session import GraphFolder
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.memory import require_memory
from nvvl.staging import MANIFEST_NAME


@contextlib.contextmanager
def open_graphs(folder: Path) -> Iterator[GraphFolder]:
    """Open a folder of graphs, or make the graphs of a checkpoint for as long as they are used.

    Raises:
        EngineError: if files of the folder are not those that were written.
        CheckpointError: if a checkpoint is not what its manifest says.
        HardwareError: if memory cannot hold the graphs of a checkpoint.
    """
    if (folder / IO_NAME).is_file():
        faults = file_faults(folder)
        if faults:
            raise EngineError(f"{folder / MANIFEST_NAME}: {'; '.join(faults)}; export again")
        yield GraphFolder(folder)
        return
    if not (folder / "config.json").is_file():
        raise EngineError(f"{folder}: required a checkpoint, or graphs that nvvl export onnx wrote")
    # prefill and decode hold the weights each
    require_memory(2 * float32_bytes(folder), str(folder), "cpu")
    with tempfile.TemporaryDirectory(prefix="nvvl-") as parent:
        dest = Path(parent) / "graphs"
        export_onnx(folder, dest, GraphRecipe(dtype="f32", kv_cache="growing"))
        yield GraphFolder(dest)


def float32_bytes(folder: Path) -> int:
    """Return about how many bytes a checkpoint's weights take in float32."""
    infos = Checkpoint(folder).tensors.values()
    return 4 * sum(2 * info.numel if info.dtype == "U8" else info.numel for info in infos)


def describe(graphs: GraphFolder) -> str:
    """Say in a few words what runs: the formats of its linears."""
    formats = json.loads((graphs.folder / "recipe.json").read_text(encoding="utf-8"))["formats"]
    kinds = sorted(set(formats.values()) - {"bf16"}) or ["bf16"]
    return f"{'+'.join(kinds)} on onnxruntime"
