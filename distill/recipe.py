"""What decides the outcome of a distillation besides run, teacher and data.

A recipe is a frozen dataclass and a TOML file maps to it one to one, as ``nvvl.quantize.recipe``
does: a key that is not known is an error. The recipe in force is written into the manifest of what
comes out. Nothing here imports torch.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nvvl.errors import RecipeError
from nvvl.toml_tables import read_toml, require_keys

Loss = Literal["kl", "mse", "ce"]
LossTokens = Literal["text", "answers"]
Method = Literal["whole", "layers"]
Trainable = Literal["linears", "norms", "input_scales"]

_POSITIVE = (
    "num_steps",
    "items_per_step",
    "tokens_per_batch",
    "num_validation_items",
    "validate_every",
)
_MOST = 1_000_000_000
_MOST_ITEMS = 10_000_000  # a list of more does not fit in memory
# What only the training of the whole model has.
_OF_WHOLE = (
    "loss",
    "loss_tokens",
    "layer_loss",
    "recalibrate_inputs",
    "video_pruning_rate",
    "scale_learning_rate",
    "beta2",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "recompute",
    "validate_every",
)
_SWITCHES = ("recalibrate_inputs", "recompute")
_CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(Method),
    "loss": get_args(Loss),
    "loss_tokens": get_args(LossTokens),
}


@dataclass(frozen=True, kw_only=True)
class DistillRecipe:
    """Settings of one distillation.

    Attributes:
        name: Shown in manifests and reports.
        method: ``whole`` trains the model on the loss of its logits; ``layers`` trains one layer
            after the other to give its BF16 output, in little memory. ``num_steps`` are then those
            of each layer, each step one row of tokens, and rates are fractions of a weight's size.
        trainable: What trains: ``linears``, the quantized ones of the language model, ``norms``,
            those of the language model, and ``input_scales``, the static scales of quantized
            inputs (LSQ). Everything else stays as the teacher has it.
        loss: ``kl``, forward KL(teacher || student) at temperature 1; ``mse`` on logits; ``ce``
            against the next token, which is quantization-aware training without a teacher.
        loss_tokens: ``text``, every position but those of images and padding, or ``answers``, the
            positions that predict what the assistant says.
        layer_loss: Weight of a second term: the mean squared difference of the hidden states after
            each layer, as a fraction of their mean square. 0 leaves it out.
        recalibrate_inputs: Whether each validation first sets the input amax to the largest
            magnitude the student has met since the one before.
        video_pruning_rate: Share of video tokens that EVS drops.
        learning_rate: The highest, reached after the warmup.
        scale_learning_rate: That of learned scales, which are moved as logarithms.
        safe_learning_rate: Above it the user is warned.
        warmup_fraction: Part of the steps in which the rate rises linearly from zero; then it falls
            to zero as a cosine.
        beta2: AdamW's decay of squared gradients.
        weight_decay: AdamW's.
        max_grad_norm: Longer gradients are scaled down to it.
        ema_decay: Of a running average of the trained tensors, which is then what is validated
            and written; 0 takes the tensors themselves.
        num_steps: Optimizer steps.
        items_per_step: Items whose gradients make one optimizer step, over all processes; with
            method ``layers``, all items that are trained on.
        tokens_per_batch: Tokens a row is packed to; a step's items are cut into as many rows as
            that needs, and their gradients add up. An item that alone is longer runs alone.
        recompute: Whether the activations inside a layer are computed again in the backward pass
            in place of being kept.
        num_validation_items: Items kept out of training, on which the outcome is chosen; fewer
            where items share a picture or a text and so must stay together.
        validate_every: Steps between validations; the state is saved then.
    """

    name: str
    learning_rate: float
    method: Method = "whole"
    trainable: tuple[Trainable, ...] = ("linears", "norms")
    loss: Loss = "kl"
    loss_tokens: LossTokens = "text"
    layer_loss: float = 0.0
    recalibrate_inputs: bool = False
    video_pruning_rate: float = 0.0
    safe_learning_rate: float = 1e-5
    scale_learning_rate: float = 1e-3
    warmup_fraction: float = 0.05
    beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    num_steps: int = 1000
    items_per_step: int = 32
    tokens_per_batch: int = 16384
    recompute: bool = False
    num_validation_items: int = 128
    validate_every: int = 50

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check(field.name, getattr(self, field.name))
        if not self.trainable or not set(self.trainable) <= set(get_args(Trainable)):
            raise RecipeError(
                f"trainable: required some of {', '.join(get_args(Trainable))}, "
                f"got {list(self.trainable)!r}"
            )
        if self.recalibrate_inputs and "input_scales" in self.trainable:
            raise RecipeError(
                "recalibrate_inputs: the input scales are learned already (trainable); choose one"
            )
        if self.num_items > _MOST_ITEMS:
            raise RecipeError(
                f"num_steps: {self.num_steps} of {self.items_per_step} items each and "
                f"{self.num_validation_items} for validation make {self.num_items} items; required "
                f"at most {_MOST_ITEMS}"
            )
        if self.method == "layers":
            self._check_layers()

    @property
    def num_items(self) -> int:
        """Items of a set in which none is looked at twice, those for validation included."""
        if self.method == "layers":  # all of them are looked at in every layer
            return self.items_per_step + self.num_validation_items
        return self.num_steps * self.items_per_step + self.num_validation_items

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DistillRecipe":
        """Build a recipe from plain values.

        Raises:
            RecipeError: if a key is unknown or missing, or a value is impossible.
        """
        require_keys(cls, values, "recipe", RecipeError)
        fields = dict(values)
        if isinstance(fields.get("trainable"), list):
            fields["trainable"] = tuple(fields["trainable"])
        return cls(**fields)

    @classmethod
    def from_toml(cls, path: Path) -> "DistillRecipe":
        """Read a recipe file.

        Raises:
            RecipeError: if the file is missing, is not TOML, or as `from_dict`.
        """
        return read_toml(path, cls.from_dict, RecipeError)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values."""
        return dataclasses.asdict(self) | {"trainable": list(self.trainable)}

    def rate_factor(self, step: int) -> float:
        """Return the part of the rate at a step, from 0: linear warmup, then a cosine to zero."""
        num_warmup = math.ceil(self.warmup_fraction * self.num_steps)
        if step < num_warmup:
            return (step + 1) / num_warmup
        progress = (step - num_warmup) / max(1, self.num_steps - num_warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.learning_rate * self.rate_factor(step)

    def _check_layers(self) -> None:
        """Refuse what the training of single layers would silently skip."""
        if "linears" not in self.trainable or "input_scales" in self.trainable:
            raise RecipeError(
                'trainable: method "layers" trains linears, with or without norms, got '
                f"{list(self.trainable)!r}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _OF_WHOLE and value != field.default:
                raise RecipeError(
                    f'{field.name}: has no meaning with method "layers", got {value!r}'
                )

    def _check(self, key: str, value: object) -> None:
        if key in _CHOICES:
            if value not in _CHOICES[key]:
                raise RecipeError(
                    f"{key}: required one of {', '.join(_CHOICES[key])}, got {value!r}"
                )
        elif key == "name":
            if not isinstance(value, str) or not value:
                raise RecipeError(f"name: required a text, got {value!r}")
        elif key in _SWITCHES:
            if not isinstance(value, bool):
                raise RecipeError(f"{key}: required true or false, got {value!r}")
        elif key in _POSITIVE:
            if type(value) is not int or not 1 <= value <= _MOST:
                raise RecipeError(f"{key}: required an integer from 1 to {_MOST}, got {value!r}")
        elif key != "trainable":
            low, high = _range_of(key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RecipeError(f"{key}: required a number, got {value!r}")
            if key == "learning_rate":
                if not low < value <= high:
                    raise RecipeError(f"{key}: required above 0 and at most 1, got {value!r}")
            elif key in ("ema_decay", "video_pruning_rate"):
                if not low <= value < high:
                    raise RecipeError(f"{key}: required 0 or more and below 1, got {value!r}")
            elif not low <= value <= high:
                raise RecipeError(f"{key}: required {low} to {high:g}, got {value!r}")


def warn_about_rate(recipe: DistillRecipe) -> None:
    """Warn of a learning rate above the recipe's safe one."""
    if recipe.learning_rate <= recipe.safe_learning_rate:
        return
    reason = (
        "in published runs of full-size models 2e-5 cost more accuracy than quantization did and "
        "1e-4 ruined them (arXiv 2601.20088); 2e-6 is the default"
    )
    if recipe.method == "layers":
        reason = (
            "it is the part of its size by which a step may move a weight, and layers that get no "
            "better stay as the teacher has them; lower it, or raise safe_learning_rate"
        )
    warnings.warn(
        f"learning_rate {recipe.learning_rate:g} is above {recipe.safe_learning_rate:g}: {reason}",
        stacklevel=3,
    )


def _range_of(key: str) -> tuple[float, float]:
    return (0, 1e9) if key in ("weight_decay", "max_grad_norm", "layer_loss") else (0, 1)
