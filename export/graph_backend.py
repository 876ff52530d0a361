"""One conversation over a folder of graphs or engines, without the torch network.

The backend of `nvvl.export.answer` for whatever runs graphs: onnxruntime or a TensorRT library.
Prompts longer than the graphs' ``tokens`` are prefilled in pieces.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvvl.export.graph_runner import GraphRunner, States
from nvvl.export.onnx_export import EMBEDDING_NAME
from nvvl.model.safetensors_io import read_header, read_tensor


class GraphBackend:
    """One conversation with a folder of graphs or engines."""

    def __init__(self, graphs: GraphRunner) -> None:
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
