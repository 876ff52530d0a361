"""Runs a folder of graphs with onnxruntime on the CPU, binding by ``io.json``.

A float32 graph that onnxruntime has kernels for is opened as it is; any other by its float32 twin
(`nvvl.export.onnx_twin`). Inputs and outputs are torch tensors in float32, whatever the graph's
dtype; states of an FP8 cache are the values of its codes.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from nvvl.errors import EngineError
from nvvl.export.onnx_io import read_io
from nvvl.export.onnx_twin import INPUT_OUTPUT, make_twin, needs_twin

# Above this many bytes a model cannot be handed over in memory (protobuf ends at 2 GiB).
_LARGEST_IN_MEMORY = 1_900_000_000

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


class GraphFolder:
    """The three graphs of a folder, opened when they are first used.

    Attributes:
        folder: Where they lie.
        io: The content of ``io.json``.
    """

    def __init__(
        self, folder: Path, *, expose_inputs: bool = False, num_threads: int | None = None
    ) -> None:
        """Read ``io.json``.

        Args:
            folder: what ``nvvl export onnx`` wrote.
            expose_inputs: whether runs also give the inputs of quantized linears.
            num_threads: threads of onnxruntime; as many as torch's if None.

        Raises:
            EngineError: if the folder is not one of graphs.
        """
        self.folder = folder
        self.io = read_io(folder)
        self._expose_inputs = expose_inputs
        self._num_threads = num_threads or torch.get_num_threads()
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    @property
    def model(self) -> Mapping[str, Any]:
        """What ``io.json`` says of the network."""
        return self.io["model"]

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Turn tiles (n, 3, S, S) into embeddings (n, tokens_per_tile, hidden).

        Returns:
            The embeddings, and the inputs of quantized linears if they were asked for.
        """
        outputs = self._run("vision", {"pixel_values": pixel_values})
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
        entry = self.io["graphs"]["prefill"]
        shapes = {
            port["name"]: [d if isinstance(d, int) else symbols.get(d, 0) for d in port["shape"]]
            for port in entry["inputs"]
        }
        return {state["input"]: torch.zeros(shapes[state["input"]]) for state in entry["states"]}

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
        outputs = self._run(name, fed)
        after = {s["input"]: outputs[s["output"]] for s in self.io["graphs"][name]["states"]}
        return StepOutput(outputs["logits"], after, _quantized_inputs(outputs))

    def _run(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if name not in self._sessions:
            path = self.folder / self.io["graphs"][name]["file"]
            self._sessions[name] = open_session(
                path, expose_inputs=self._expose_inputs, num_threads=self._num_threads
            )
        session = self._sessions[name]
        wanted = [port.name for port in session.get_inputs()]
        arrays = {key: _to_numpy(inputs[key]) for key in wanted}
        names = [port.name for port in session.get_outputs()]
        outputs = zip(names, session.run(None, arrays), strict=True)
        return {key: torch.from_numpy(np.asarray(value)) for key, value in outputs}


def open_session(
    path: Path, *, expose_inputs: bool = False, num_threads: int = 1
) -> onnxruntime.InferenceSession:
    """Open a graph, or its float32 twin, with onnxruntime's CPU provider.

    Args:
        path: an ONNX file that nvvl wrote.
        expose_inputs: as of `nvvl.export.onnx_twin.make_twin`.
        num_threads: threads of one run.

    Raises:
        EngineError: if the graph cannot be read, or onnxruntime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    try:
        if not expose_inputs and not needs_twin(onnx.load(path, load_external_data=False)):
            return onnxruntime.InferenceSession(str(path), options, providers)
        twin = make_twin(path, expose_inputs=expose_inputs)
        if twin.ByteSize() <= _LARGEST_IN_MEMORY:
            return onnxruntime.InferenceSession(twin.SerializeToString(), options, providers)
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(twin, Path(folder) / "twin.onnx", save_as_external_data=True)
            return onnxruntime.InferenceSession(f"{folder}/twin.onnx", options, providers)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EngineError(f"{path}: onnxruntime cannot open it ({reason})") from error


def _to_numpy(tensor: Tensor) -> np.ndarray:
    wide = tensor if tensor.dtype == torch.int64 else tensor.float()
    return wide.contiguous().numpy()


def _quantized_inputs(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(INPUT_OUTPUT): value
        for name, value in outputs.items()
        if name.startswith(INPUT_OUTPUT)
    }
