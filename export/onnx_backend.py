"""``nvvl chat --backend onnx``: the whole model on onnxruntime, without the torch network.

Takes a folder that ``nvvl export onnx`` wrote, whose files must have the hashes of its manifest; or
a checkpoint, whose graphs are then made in a temporary folder, in float32 and with a growing cache.
Prompts longer than the graphs' ``tokens`` are prefilled in pieces.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nvvl.errors import EngineError
from nvvl.export.onnx_export import EMBEDDING_NAME, export_onnx, file_faults
from nvvl.export.onnx_io import IO_NAME
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.export.onnx_session import GraphFolder, States
from nvvl.model.safetensors_io import read_header, read_tensor
from nvvl.quantize.staging import MANIFEST_NAME


class OnnxBackend:
    """One conversation with a folder of graphs."""

    def __init__(self, graphs: GraphFolder) -> None:
        """Read the embedding table, where the graphs do not hold it.

        Raises:
            CheckpointError: if the table's file is malformed.
        """
        self._graphs = graphs
        self._table: Tensor | None = None
        if graphs.model["token_embedding"] == "sidecar":
            (info,) = read_header(graphs.folder / EMBEDDING_NAME).values()
            self._table = read_tensor(info)
        self._piece: int = graphs.io["dimensions"]["tokens"][-1]
        self._image_token: int = graphs.model["image_token_id"]
        self._states: States = graphs.start(1)
        self._position = 0

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Run the vision graph, as many tiles at once as it is meant for."""
        most = self._graphs.io["dimensions"]["tiles"][-1]
        parts = [self._graphs.encode_images(tiles)[0] for tiles in pixel_values.split(most)]
        return torch.cat(parts)

    def prefill(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """Run the prompt in pieces."""
        done = 0
        for piece in ids.split(self._piece, dim=1):
            num_images = int((piece == self._image_token).sum())
            rows = None if features is None else features[done : done + num_images]
            done += num_images
            logits = self._run(piece, rows)
        return logits

    def decode(self, token: int) -> Tensor:
        """Run one token."""
        return self._run(torch.tensor([[token]]), None)

    def _run(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        inputs = self._graphs.token_inputs(ids, rows, lambda: self._embed(ids, rows))
        output = self._graphs.step(inputs, self._states, position=self._position)
        self._states = output.states
        self._position += ids.shape[1]
        return output.logits[0]

    def _embed(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        assert self._table is not None
        embeds = F.embedding(ids, self._table).float()
        if rows is not None:
            embeds[ids == self._image_token] = rows
        return embeds


@contextlib.contextmanager
def open_graphs(folder: Path) -> Iterator[GraphFolder]:
    """Open a folder of graphs, or make the graphs of a checkpoint for as long as they are used.

    Raises:
        EngineError: if files of the folder are not those that were written.
        CheckpointError: if a checkpoint is not what its manifest says.
    """
    if (folder / IO_NAME).is_file():
        faults = file_faults(folder)
        if faults:
            raise EngineError(f"{folder / MANIFEST_NAME}: {'; '.join(faults)}; export again")
        yield GraphFolder(folder)
        return
    if not (folder / "config.json").is_file():
        raise EngineError(f"{folder}: required a checkpoint, or graphs that nvvl export onnx wrote")
    with tempfile.TemporaryDirectory(prefix="nvvl-") as parent:
        dest = Path(parent) / "graphs"
        export_onnx(folder, dest, GraphRecipe(dtype="f32", kv_cache="growing"))
        yield GraphFolder(dest)


def describe(graphs: GraphFolder) -> str:
    """Say in a few words what runs: formats of linears, dtype of the graphs, KV cache."""
    formats = json.loads((graphs.folder / "recipe.json").read_text(encoding="utf-8"))["formats"]
    kinds = sorted(set(formats.values()) - {"bf16"}) or ["bf16"]
    return f"{'+'.join(kinds)} on onnxruntime"
