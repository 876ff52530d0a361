"""Where the language model is cut, when its graphs are made as several consecutive ones.

A builder holds a graph's weights several times over. A model too large for the machine that builds
is therefore made as parts: each has some consecutive layers, takes the hidden activations that the
part before gives, and has the states of its own layers. The cuts leave about equal weights in each.
"""

import re
from collections.abc import Mapping, Sequence

from nvvl.errors import EngineError

_LAYER = re.compile(r"language_model\.backbone\.layers\.(\d+)\.")
_LAST = ("language_model.lm_head.", "language_model.backbone.norm_f.")


def layer_sizes(tensor_bytes: Mapping[str, int]) -> list[int]:
    """Return the bytes of weights of each layer; norm and head count to the last one.

    Args:
        tensor_bytes: Of every tensor of a checkpoint, or initializer of a graph, by name.
    """
    layers: dict[int, int] = {}
    rest = 0
    for name, size in tensor_bytes.items():
        if match := _LAYER.match(name):
            layers[int(match[1])] = layers.get(int(match[1]), 0) + size
        elif name.startswith(_LAST):
            rest += size
    sizes = [layers[layer] for layer in sorted(layers)]
    if sizes:
        sizes[-1] += rest
    return sizes


def split_layers(sizes: Sequence[int], num_parts: int) -> list[range]:
    """Cut layers into consecutive parts of about the same size.

    Args:
        sizes: Bytes of each layer.
        num_parts: How many parts; none is left empty.

    Raises:
        EngineError: if there are fewer layers than parts.
    """
    if not 1 <= num_parts <= len(sizes):
        raise EngineError(
            f"--parts {num_parts}: the language model has {len(sizes)} layers, so it can be cut "
            f"into 1 to {len(sizes)} parts"
        )
    parts: list[range] = []
    start = 0
    for left in range(num_parts, 0, -1):
        share = sum(sizes[start:]) / left
        stop = start + 1
        while len(sizes) - stop >= left and sum(sizes[start:stop]) + sizes[stop] / 2 <= share:
            stop += 1
        stop = len(sizes) if left == 1 else stop
        parts.append(range(start, stop))
        start = stop
    return parts


def largest_part(sizes: Sequence[int], num_parts: int) -> int:
    """Return the bytes of the largest part."""
    return max(sum(sizes[i] for i in part) for part in split_layers(sizes, num_parts))
