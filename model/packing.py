"""Several sequences one behind the other in one row, each as if it stood alone.

Training on short items wastes most of a padded batch, so they are packed. Nothing may then leak
over a boundary: attention looks within a sequence, the convolution's window starts with zeros, and
the Mamba2 state starts from zero. There is no position embedding that would need a reset.

The alternative, position ids alone, resets attention and leaves the Mamba state of one document in
the next.

Shapes: T tokens of the row, K convolution kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the sequences of a row begin and end.

    Attributes:
        lengths: Tokens of each sequence, in order; their sum is T.
        ids: (T,) int64, the number of the sequence each token belongs to.
    """

    lengths: tuple[int, ...]
    ids: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> "Packing":
        """Build the packing of sequences of these lengths.

        Raises:
            ValueError: if there is none, or one is empty.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: required positive token counts, got {list(lengths)}")
        numbers = torch.arange(len(lengths))
        ids = numbers.repeat_interleave(torch.tensor(lengths)).to(device)
        return cls(tuple(lengths), ids)

    def places(self, gap: int) -> Tensor:
        """Return (T,) int64: where tokens go if ``gap`` places are left before each sequence."""
        return torch.arange(len(self.ids), device=self.ids.device) + gap * (self.ids + 1)

    def align(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Say where tokens go if each sequence begins with a chunk.

        Returns:
            Places (T,) int64, and for each chunk 0 where it begins a sequence, else 1, float32.
        """
        lengths = torch.tensor(self.lengths)
        num_chunks = (lengths + chunk - 1) // chunk
        keep = torch.ones(int(num_chunks.sum()))
        keep[num_chunks.cumsum(0) - num_chunks] = 0
        filled = (num_chunks * chunk - lengths).cumsum(0)
        shifts = torch.cat([filled.new_zeros(1), filled[:-1]]).to(self.ids.device)
        places = torch.arange(len(self.ids), device=self.ids.device) + shifts[self.ids]
        return places, keep.to(self.ids.device)

    def to(self, device: torch.device | str) -> "Packing":
        """Return it with its tensor on a device."""
        return Packing(self.lengths, self.ids.to(device))
