"""The steps of a conversation over the graphs of a folder, whatever runs a graph.

``io.json`` says what goes in and comes out; a subclass runs one graph: `nvvl.export.onnx_session`
by onnxruntime, `nvvl.export.runtime` by an engine. Where prefill and decode are made as several
graphs, the hidden activations of each go to the next.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvvl.errors import EngineError
from nvvl.export.onnx_io import read_io
from nvvl.export.onnx_twin import INPUT_OUTPUT

States = dict[str, Tensor]


@dataclass(frozen=True)
class StepOutput:
    """What a run of ``prefill`` or ``decode`` gives.

    Attributes:
        logits: (B, vocab) float32, after the last new token.
        states: by the names of the next run's inputs.
        quantized_inputs: Of each quantized linear, by module name, if they were asked for.
    """

    logits: Tensor
    states: States
    quantized_inputs: Mapping[str, Tensor]


class GraphRunner(abc.ABC):
    """The graphs of a folder, run step by step.

    Attributes:
        folder: Where they lie.
        io: The content of ``io.json``.
    """

    def __init__(self, folder: Path) -> None:
        """Read ``io.json``.

        Raises:
            EngineError: if the folder has none.
        """
        self.folder = folder
        self.io = read_io(folder)

    @abc.abstractmethod
    def run_graph(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph on what it takes of ``inputs``; gives its outputs by name."""

    @property
    def model(self) -> Mapping[str, Any]:
        """What ``io.json`` says of the network."""
        return self.io["model"]

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Turn tiles (n, 3, S, S) into embeddings (n, tokens_per_tile, hidden).

        Returns:
            The embeddings, and the inputs of quantized linears if they were asked for.
        """
        outputs = self.run_graph("vision", {"pixel_values": pixel_values})
        return outputs["image_embeds"], _quantized_inputs(outputs)

    def token_inputs(
        self, ids: Tensor, features: Tensor | None, embed: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """Return what these graphs take for new tokens.

        Args:
            ids: (B, T) int64.
            features: (..., hidden) embeddings of the image tokens among them; None without any.
            embed: gives (B, T, hidden) of ids and features, where the graphs take embeddings.
        """
        if self.model["token_embedding"] == "sidecar":
            return {"inputs_embeds": embed()}
        hidden = self.model["hidden_size"]
        rows = torch.zeros(0, hidden) if features is None else features.reshape(-1, hidden)
        return {"input_ids": ids, "image_embeds": rows}

    def start(self, batch: int) -> States:
        """Return the states at the start of a sequence: zeros, or an empty growing cache."""
        symbols = {"batch": batch, "past_tokens": 0}
        shapes = {
            port["name"]: [d if isinstance(d, int) else symbols.get(d, 0) for d in port["shape"]]
            for part in self.io["parts"]["prefill"]
            for port in self.io["graphs"][part]["inputs"]
        }
        names = [state["input"] for state in self._states("prefill")]
        return {name: torch.zeros(shapes[name]) for name in names}

    def step(self, inputs: Mapping[str, Tensor], states: States, *, position: int) -> StepOutput:
        """Run new tokens: ``decode`` for one after the first, ``prefill`` otherwise.

        Args:
            inputs: ``inputs_embeds`` (B, T, hidden); or, where the graphs look tokens up,
                ``input_ids`` (B, T) and ``image_embeds`` (n, hidden).
            states: what `start` or the step before gave.
            position: how many tokens came before.

        Raises:
            EngineError: if the tokens do not fit into a cache of fixed capacity.
        """
        length = next(iter(inputs.values())).shape[1]
        name = "decode" if length == 1 and position else "prefill"
        fed = dict(inputs) | states
        if self.model["kv_cache"] == "fixed":
            capacity = self.model["kv_capacity"]
            if position + length > capacity:
                raise EngineError(
                    f"{self.folder}: {position + length} tokens, but the graphs hold {capacity}; "
                    "ask for less, or export with a larger kv_capacity in --recipe"
                )
            fed["positions"] = torch.arange(position, position + length)
        outputs = self._run_parts(name, fed)
        after = {state["input"]: outputs[state["output"]] for state in self._states(name)}
        return StepOutput(outputs["logits"], after, _quantized_inputs(outputs))

    def _run_parts(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graphs that ``prefill`` or ``decode`` consists of, one after the other."""
        outputs: dict[str, Tensor] = {}
        for part in self.io["parts"][name]:
            outputs |= self.run_graph(part, inputs)
            if "hidden_out" in outputs:
                inputs = {**inputs, "hidden_in": outputs.pop("hidden_out")}
        return outputs

    def _states(self, name: str) -> list[dict[str, Any]]:
        graphs = self.io["graphs"]
        return [state for part in self.io["parts"][name] for state in graphs[part]["states"]]


def _quantized_inputs(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(INPUT_OUTPUT): value
        for name, value in outputs.items()
        if name.startswith(INPUT_OUTPUT)
    }
