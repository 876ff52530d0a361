"""``io.json``: what goes into each graph of a folder and what comes out, for whoever runs them.

graphs       by name: file, inputs and outputs in order, each with name, dtype and shape, where a
             dynamic dimension is a word; states as pairs of an input and an output
parts        names of the graphs that prefill and decode consist of, in order; mostly one each
dimensions   smallest, usual and largest value of each of those words, for shape profiles
model        what a runner must know of the network: sizes, special tokens
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvvl.errors import EngineError, describe_misfit
from nvvl.export.onnx_graph import Graph, Port
from nvvl.export.onnx_language import list_states
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.model.config import VLMConfig

IO_NAME = "io.json"
FORMAT_VERSION = 1

Span = tuple[int, int, int]


def describe_graphs(
    graphs: Sequence[Graph], config: VLMConfig, recipe: GraphRecipe
) -> dict[str, Any]:
    """Return the content of ``io.json``."""
    states = [
        {"layer": s.layer, "kind": s.kind, "input": s.past_name, "output": s.present_name}
        for s in list_states(config.language, recipe)
    ]
    entries = {}
    parts: dict[str, list[str]] = {"prefill": [], "decode": []}
    for graph in graphs:
        own = {port.name for port in graph.inputs}
        entries[graph.name] = {
            "file": f"{graph.name}.onnx",
            "inputs": [_describe_port(port) for port in graph.inputs],
            "outputs": [_describe_port(port) for port in graph.outputs],
            "states": [state for state in states if state["input"] in own],
        }
        if graph.name != "vision":
            parts[graph.name.partition(".")[0]].append(graph.name)
    return {
        "format_version": FORMAT_VERSION,
        "graphs": entries,
        "parts": parts,
        "dimensions": {
            name: list(span)
            for name, span in dimension_spans(recipe).items()
            if any(name in port.shape for graph in graphs for port in graph.inputs)
        },
        "model": {
            "dtype": recipe.dtype,
            "kv_cache": recipe.kv_cache,
            "kv_capacity": recipe.kv_capacity,
            "kv_dtype": recipe.kv_dtype,
            "token_embedding": recipe.token_embedding,
            "vision": recipe.vision,
            "hidden_size": config.language.hidden_size,
            "vocab_size": config.language.vocab_size,
            "tile_size": config.image_size,
            "tokens_per_tile": config.tokens_per_tile,
            "image_token_id": config.image_token_id,
            "eos_token_ids": list(config.language.eos_token_ids),
        },
    }


def dimension_spans(recipe: GraphRecipe) -> dict[str, Span]:
    """Return (smallest, usual, largest) of each dynamic dimension."""
    longest = recipe.prefill_tokens
    return {
        "batch": (1, 1, recipe.max_batch),
        "tiles": (1, min(4, recipe.max_tiles), recipe.max_tiles),
        "tokens": (1, min(512, longest), longest),
        "past_tokens": (0, min(512, recipe.kv_capacity), recipe.kv_capacity),
        "image_tokens": (0, min(256, longest), longest * recipe.max_batch),
    }


def read_io(folder: Path) -> dict[str, Any]:
    """Read ``io.json`` of a folder of graphs.

    Raises:
        EngineError: if it is missing or of another version.
    """
    path = folder / IO_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        files = {name: graph["file"] for name, graph in values["graphs"].items()}
    except OSError as error:
        raise EngineError(
            f"{path}: cannot be read ({error.strerror}); required a folder that nvvl export onnx "
            "wrote"
        ) from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"{path}: not an io.json of nvvl ({describe_misfit(error)}); export again"
        ) from None
    for name, file in files.items():  # engines are written under these names
        if not (_is_plain(name) and _is_plain(file)):
            raise EngineError(
                f"{path}: graph {name!r} in file {file!r}: required names of letters, digits, _, - "
                "and dots; export again"
            )
    if version != FORMAT_VERSION:
        raise EngineError(
            f"{path}: format_version {version}, this nvvl reads {FORMAT_VERSION}; export again"
        )
    return values


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None


def _describe_port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": list(port.shape)}
