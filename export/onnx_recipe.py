"""What the graphs of one export look like: a frozen recipe that a TOML file maps to one to one.

    dtype = "bf16"               # of activations: bf16 or f32
    kv_cache = "fixed"           # fixed capacity with positions, or growing
    kv_capacity = 4096           # tokens that a fixed cache holds
    kv_dtype = "same"            # of keys and values: that of activations, or fp8
    token_embedding = "sidecar"  # looked up outside the graphs, or inside
    vision = "checkpoint"        # as the checkpoint has it, or fp8
    num_parts = 1                # consecutive graphs that prefill and decode are made as

An unknown key is an error that names the nearest known one.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from nvvl.errors import RecipeError
from nvvl.toml_tables import read_toml, require_keys

# Eight times the tokens that the released models are made for.
_MOST = 2**20


@dataclass(frozen=True, kw_only=True)
class GraphRecipe:
    """Everything that decides the graphs, besides the checkpoint.

    Attributes:
        dtype: Of activations and products.
        kv_cache: ``fixed``: keys and values have room for ``kv_capacity`` tokens, and the input
            ``positions`` says where new ones go. ``growing``: they come back longer.
        kv_capacity: Most tokens of prompt and answer together; of a growing cache, what shape
            profiles allow.
        kv_dtype: ``fp8`` keeps keys and values as E4M3 codes, rounded once when they are new, with
            a scale of 1: what a server does with a checkpoint that has no scales for them.
        token_embedding: ``sidecar``: graphs take embeddings, the table lies in
            ``embedding.safetensors``. ``inside``: they take token ids and image embeddings.
        vision: ``fp8`` quantizes the linears of vision tower and projector in the graph, where the
            checkpoint keeps them BF16 for servers' sake (`nvvl.export.vision_fp8`).
        num_parts: Consecutive graphs that ``prefill`` and ``decode`` each become, for machines with
            too little memory to build from one; the hidden activations of each go to the next.
        max_batch: Largest batch of the shape profiles.
        max_tiles: Most tiles of one run of the vision graph in the shape profiles.
        prefill_tokens: Most new tokens of one run of the prefill graph in the shape profiles;
            longer prompts are run in pieces.
    """

    dtype: Literal["bf16", "f32"] = "bf16"
    kv_cache: Literal["fixed", "growing"] = "fixed"
    kv_capacity: int = 4096
    kv_dtype: Literal["same", "fp8"] = "same"
    token_embedding: Literal["sidecar", "inside"] = "sidecar"
    vision: Literal["checkpoint", "fp8"] = "checkpoint"
    num_parts: int = 1
    max_batch: int = 4
    max_tiles: int = 13
    prefill_tokens: int = 2048

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is int and (type(value) is not int or not 1 <= value <= _MOST):
                raise RecipeError(f"{name}: required an integer from 1 to {_MOST}, got {value!r}")
            if kind is not int and value not in get_args(kind):
                raise RecipeError(
                    f"{name}: required one of {', '.join(get_args(kind))}, got {value!r}"
                )
        if self.prefill_tokens > self.kv_capacity:
            raise RecipeError(
                f"prefill_tokens: {self.prefill_tokens} new tokens do not fit into kv_capacity "
                f"{self.kv_capacity}; lower it, or raise the capacity"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GraphRecipe":
        """Build a recipe from plain values.

        Raises:
            RecipeError: if a key is unknown, or a value is impossible.
        """
        require_keys(cls, values, "recipe", RecipeError)
        return cls(**values)

    @classmethod
    def from_toml(cls, path: Path) -> "GraphRecipe":
        """Read a recipe file.

        Raises:
            RecipeError: if the file is missing, is not TOML, or as `from_dict`.
        """
        return read_toml(path, cls.from_dict, RecipeError)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` and JSON take."""
        return dataclasses.asdict(self)
