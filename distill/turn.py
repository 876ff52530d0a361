"""The weights of a model whose bases are turned, such that it computes what it did.

What writes hidden states, embeddings, projector and the last linear of each layer, is multiplied by
the rotation. What reads them, through a norm with its gain, takes the gain into its weights, which
turn back; the norm then has the gains that were found, and the weights behind it undo those too.
Values are turned in the rows of ``v_proj`` and turned back in the columns of ``o_proj``, since
attention only takes averages of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nvvl.distill.backbone import PREFIX
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.config import LayerKind, VLMConfig

Change = Callable[[Tensor], Tensor]

_PROJECTOR = "mlp1.3.weight"
_HEAD = "language_model.lm_head.weight"
_READERS: dict[LayerKind, tuple[str, ...]] = {
    "mamba": ("in_proj",),
    "attention": ("q_proj", "k_proj", "v_proj"),
    "mlp": ("up_proj",),
}
_WRITERS: dict[LayerKind, str] = {"mamba": "out_proj", "attention": "o_proj", "mlp": "down_proj"}


@dataclass(frozen=True)
class Turn:
    """How the bases of a model are changed.

    Attributes:
        hidden: (D, D) orthogonal; hidden states are multiplied by it from the right.
        gains: (D,) of each layer's norm.
        values: Of each attention layer's key-value heads, a matrix (head_dim, head_dim) that values
            are multiplied by from the right, and the inverse of its transpose.
    """

    hidden: Tensor
    gains: Sequence[Tensor]
    values: Mapping[int, Sequence[tuple[Tensor, Tensor]]]


class TurnedWeights(Mapping[str, Tensor]):
    """The tensors of a checkpoint that a turn changes, float32, each made when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, turn: Turn) -> None:
        self._checkpoint = checkpoint
        self._turn = turn
        self._changes = dict(self._list_changes(checkpoint.config))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._load(name)
        for change in self._changes[name]:
            tensor = change(tensor)
        return tensor.cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def _list_changes(self, config: VLMConfig) -> Iterator[tuple[str, list[Change]]]:
        turn = self._turn
        yield f"{PREFIX}embeddings.weight", [lambda weight: weight @ turn.hidden]
        yield _PROJECTOR, [lambda weight: turn.hidden.T @ weight]
        yield f"{PREFIX}norm_f.weight", [torch.ones_like]
        yield _HEAD, [partial(self._turn_reader, f"{PREFIX}norm_f.weight", None)]
        for index, kind in enumerate(config.language.layers):
            layer = f"{PREFIX}layers.{index}."
            norm, gains = f"{layer}norm.weight", turn.gains[index]
            yield norm, [lambda _, gains=gains: gains]  # type: ignore[misc]
            for leaf in _READERS[kind]:
                changes: list[Change] = [partial(self._turn_reader, norm, gains)]
                if leaf == "v_proj":
                    changes.append(partial(_turn_values, turn.values[index]))
                yield f"{layer}mixer.{leaf}.weight", changes
            changes = [lambda weight: turn.hidden.T @ weight]
            if kind == "attention":
                changes.append(partial(_turn_value_readers, turn.values[index]))
            yield f"{layer}mixer.{_WRITERS[kind]}.weight", changes

    def _turn_reader(self, norm: str, gains: Tensor | None, weight: Tensor) -> Tensor:
        turned = (weight * self._load(norm)) @ self._turn.hidden
        return turned if gains is None else turned / gains

    def _load(self, name: str) -> Tensor:
        return self._checkpoint.load(name).float().to(self._turn.hidden.device)


def _turn_values(heads: Sequence[tuple[Tensor, Tensor]], weight: Tensor) -> Tensor:
    """Turn what ``v_proj`` (heads * head_dim, hidden) writes."""
    parts = weight.unflatten(0, (len(heads), -1))
    return torch.cat([matrix.T @ part for part, (matrix, _) in zip(parts, heads, strict=True)])


def _turn_value_readers(heads: Sequence[tuple[Tensor, Tensor]], weight: Tensor) -> Tensor:
    """Turn back what ``o_proj`` (hidden, query heads * head_dim) reads."""
    head_dim = len(heads[0][0])
    parts = weight.unflatten(1, (len(heads), -1, head_dim))  # query heads of one in a row
    turned = [parts[:, i] @ inverse for i, (_, inverse) in enumerate(heads)]
    return torch.stack(turned, 1).flatten(1)
