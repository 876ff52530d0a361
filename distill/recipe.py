"""What decides the outcome of a distillation besides run, teacher and data.

A recipe is a frozen dataclass and a TOML file maps to it one to one, as ``nvvl.quantize.recipe``
does: a key that is not known is an error. The recipe in force is written into the manifest of what
comes out. Nothing here imports torch.
"""

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nvvl.errors import RecipeError
from nvvl.quantize.recipe import near_names

Loss = Literal["kl", "mse", "ce"]
LossTokens = Literal["text", "answers"]
Trainable = Literal["linears", "norms"]

_POSITIVE = ("num_steps", "items_per_step", "tokens_per_batch", "validate_every")
_CHOICES: dict[str, tuple[str, ...]] = {
    "loss": get_args(Loss),
    "loss_tokens": get_args(LossTokens),
}


@dataclass(frozen=True, kw_only=True)
class DistillRecipe:
    """Settings of one distillation.

    Attributes:
        name: Shown in manifests and reports.
        trainable: What trains: ``linears``, the quantized ones of the language model, and
            ``norms``, those of the language model. Everything else stays as the teacher has it.
        loss: ``kl``, forward KL(teacher || student) at temperature 1; ``mse`` on logits; ``ce``
            against the next token, which is quantization-aware training without a teacher.
        loss_tokens: ``text``, every position but those of images and padding, or ``answers``, the
            positions that predict what the assistant says.
        learning_rate: The highest, reached after the warmup.
        safe_learning_rate: Above it the user is warned.
        warmup_fraction: Part of the steps in which the rate rises linearly from zero; then it falls
            to zero as a cosine.
        beta2: AdamW's decay of squared gradients.
        weight_decay: AdamW's.
        max_grad_norm: Longer gradients are scaled down to it.
        num_steps: Optimizer steps.
        items_per_step: Items whose gradients make one optimizer step.
        tokens_per_batch: Most tokens, padding counted, that run at once; a step's items are cut
            into as many batches as that needs. An item that alone is longer runs alone.
        num_validation_items: Items kept out of training, on which the outcome is chosen.
        validate_every: Steps between validations; the state is saved then.
    """

    name: str
    learning_rate: float
    trainable: tuple[Trainable, ...] = ("linears", "norms")
    loss: Loss = "kl"
    loss_tokens: LossTokens = "text"
    safe_learning_rate: float = 1e-5
    warmup_fraction: float = 0.05
    beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_steps: int = 1000
    items_per_step: int = 32
    tokens_per_batch: int = 16384
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

    @property
    def num_training_items(self) -> int:
        """Items that are looked at, if none is looked at twice."""
        return self.num_steps * self.items_per_step

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DistillRecipe":
        """Build a recipe from plain values.

        Raises:
            RecipeError: if a key is unknown or missing, or a value is impossible.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise RecipeError(f"recipe: unknown key {key!r}{near_names(key, known)}")
        for key in ("name", "learning_rate"):
            if key not in values:
                raise RecipeError(f"recipe: missing {key}")
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
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not valid TOML ({error})") from None
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values."""
        return dataclasses.asdict(self) | {"trainable": list(self.trainable)}

    def to_toml(self) -> str:
        """Return the text of a file that `from_toml` reads back to an equal recipe."""
        # JSON strings, numbers and lists of strings are valid TOML as they stand
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in self.to_dict().items())

    def learning_rate_at(self, step: int) -> float:
        """Return the rate of a step, counted from 0: linear warmup, then a cosine to zero."""
        num_warmup = math.ceil(self.warmup_fraction * self.num_steps)
        if step < num_warmup:
            return self.learning_rate * (step + 1) / num_warmup
        progress = (step - num_warmup) / max(1, self.num_steps - num_warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def _check(self, key: str, value: object) -> None:
        if key in _CHOICES:
            if value not in _CHOICES[key]:
                raise RecipeError(
                    f"{key}: required one of {', '.join(_CHOICES[key])}, got {value!r}"
                )
        elif key == "name":
            if not isinstance(value, str) or not value:
                raise RecipeError(f"name: required a text, got {value!r}")
        elif key in _POSITIVE or key == "num_validation_items":
            if type(value) is not int or value < 1:
                raise RecipeError(f"{key}: required an integer of at least 1, got {value!r}")
        elif key != "trainable":
            low, high = _range_of(key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RecipeError(f"{key}: required a number, got {value!r}")
            if not low <= value <= high or (key == "learning_rate" and value == 0):
                raise RecipeError(f"{key}: required {low} to {high:g}, got {value!r}")


def _range_of(key: str) -> tuple[float, float]:
    if key in ("learning_rate", "safe_learning_rate", "warmup_fraction", "beta2"):
        return 0, 1
    return 0, 1e9
