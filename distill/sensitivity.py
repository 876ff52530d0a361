"""What an error in the input of a linear costs at the output of the model.

Rounding moves the input ``x`` of a linear by a small ``e``, and the model's distribution ``p`` of
the next token away from itself. To second order, with ``u`` the gradient of ``log p(y)`` with
respect to ``x`` for a token ``y`` drawn from ``p`` (so that u u^T is Fisher's information),

    KL = 1/2 E_y (u . e)^2.

A format with blocks spreads its error evenly over the channels of a block, in proportion to the
block's energy. What counts is therefore, block by block, the energy of ``x`` times that of ``u``:
`Sensitivity` has the two second moments that give both in any basis.

Shapes: T tokens, D channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nvvl.distill.backbone import PREFIX, Backbone
from nvvl.distill.losses import Positions, chunk_positions, chunked_loss
from nvvl.distill.prepare import Prepared
from nvvl.model.attention import Attention
from nvvl.model.vlm import Layer, NemotronNanoVL


class Sensitivity:
    """Second moments of one input and of the gradients there.

    Attributes:
        gradients: (D, D), the sum over tokens of u u^T.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.gradients = torch.zeros(size, size, device=device)
        self._inputs = torch.zeros(size, size, device=device)
        self._weight = torch.zeros((), device=device)

    @property
    def inputs(self) -> Tensor:
        """(D, D), the mean over tokens of x x^T, each token with the weight u . u."""
        return self._inputs / self._weight.clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def add(self, x: Tensor, u: Tensor) -> None:
        """Take tokens into account: their inputs and the gradients there, (T, D) float."""
        x, u = x.float(), u.float()
        weights = u.square().sum(-1, keepdim=True)
        self.gradients.addmm_(u.T, u)
        self._inputs.addmm_(x.T, x * weights)
        self._weight += weights.sum()


def norm_key(layer: int) -> str:
    """Name the normalized hidden states that a layer reads, its norm's gain left out."""
    return f"{PREFIX}layers.{layer}.norm"


def values_key(layer: int, kv_head: int) -> str:
    """Name the averaged values of one key-value head, which ``o_proj`` reads."""
    return f"{PREFIX}layers.{layer}.mixer.o_proj.{kv_head}"


def measure_sensitivity(
    model: NemotronNanoVL, batches: Iterable[Prepared], *, seed: int = 0
) -> dict[str, Sensitivity]:
    """Run a model forward and back over rows of items.

    Args:
        model: In BF16; nothing of it trains.
        batches: Rows that it made ready; the positions of their loss mask count.
        seed: Of the tokens that are drawn.

    Returns:
        The sensitivity of what each layer reads (`norm_key`) and of the values that each attention
        layer adds up (`values_key`), over all query heads of a key-value head.
    """
    language = model.language_model
    backbone = Backbone(language.backbone.layers, language.backbone.norm_f, recompute=False)
    head = language.lm_head.weight
    generator = torch.Generator(head.device).manual_seed(seed)
    found: dict[str, Sensitivity] = {}
    listeners = [_Listener(index, layer, found) for index, layer in enumerate(backbone.layers)]
    try:
        for prepared in batches:
            embeds = prepared.embeds.detach().requires_grad_(True)
            hidden = backbone(embeds, packing=prepared.packing)[0][prepared.loss_mask]
            drawn = _draw_tokens(hidden.detach(), head, generator)
            mean = chunked_loss("ce", Positions(hidden, head), targets=drawn)
            (mean * len(drawn)).backward()
            for listener in listeners:
                listener.collect()
    finally:
        for listener in listeners:
            listener.remove()
    return found


class _Listener:
    """Keeps what passes one layer until the gradients are known."""

    def __init__(self, index: int, layer: nn.Module, found: dict[str, Sensitivity]) -> None:
        assert isinstance(layer, Layer)
        self._index = index
        self._layer = layer
        self._found = found
        self._hidden: Tensor | None = None
        self._kept: dict[str, Tensor] = {}
        self._hooks = [layer.norm.register_forward_hook(self._hear_norm)]
        if isinstance(layer.mixer, Attention):
            self._hooks.append(layer.mixer.o_proj.register_forward_pre_hook(self._hear_values))

    def collect(self) -> None:
        """Take what was heard into account."""
        normed, values = self._kept["normed"], self._kept.get("values")
        assert self._hidden is not None
        assert normed.grad is not None
        norm = self._layer.norm
        wide = self._hidden.float().flatten(0, -2)
        plain = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
        gradient = normed.grad.float().flatten(0, -2) * norm.weight.float()
        self._add(norm_key(self._index), plain, gradient)
        if values is not None:
            assert values.grad is not None
            attention = self._layer.mixer
            assert isinstance(attention, Attention)
            heads = (attention.num_kv_heads, -1, attention.head_dim)
            parts = (t.flatten(0, -2).unflatten(-1, heads) for t in (values.detach(), values.grad))
            for number, (x, u) in enumerate(zip(*(p.unbind(1) for p in parts), strict=True)):
                self._add(values_key(self._index, number), x.flatten(0, 1), u.flatten(0, 1))
        self._kept.clear()

    def remove(self) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()

    def _hear_norm(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not torch.is_grad_enabled():  # rows are made ready by the same layers
            return
        output.retain_grad()
        self._hidden = inputs[0].detach()
        self._kept["normed"] = output

    def _hear_values(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        inputs[0].retain_grad()
        self._kept["values"] = inputs[0]

    def _add(self, key: str, x: Tensor, u: Tensor) -> None:
        if key not in self._found:
            self._found[key] = Sensitivity(x.shape[-1], x.device)
        self._found[key].add(x, u)


@torch.no_grad()
def _draw_tokens(hidden: Tensor, head: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the next token of each position from what the model expects, (N,) int64."""
    drawn = []
    for part in hidden.split(chunk_positions(len(head))):
        shares = (part.float() @ head.float().T).softmax(-1)
        drawn.append(torch.multinomial(shares, 1, generator=generator)[:, 0])
    return torch.cat(drawn)
