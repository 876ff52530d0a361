"""Calibrated magnitudes that give no scale."""

import math

import pytest
import torch
from torch import Tensor

from nvvl.errors import CalibrationError
from nvvl.quantize.amaxes import Amax
from nvvl.quantize.pack import require_usable

ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("weight", "observed", "reason"),
    [
        (ONE, None, r"up_proj: input amax was never observed: no item reached the layer"),
        (ONE, torch.tensor(0.0), r"up_proj: input amax is 0\.0: calibration never activated it"),
        (ONE, torch.tensor(math.nan), r"up_proj: input amax is nan: .* not finite"),
        (ONE, torch.tensor(math.inf), r"up_proj: input amax is inf: .* not finite"),
        (torch.tensor(0.0), ONE, r"up_proj: weight amax is 0\.0: the weight is all zero"),
    ],
)
def test_magnitude_without_a_scale_names_the_layer_and_a_way_out(
    weight: Tensor, observed: Tensor | None, reason: str
) -> None:
    fqn = "language_model.backbone.layers.1.mixer.up_proj"
    with pytest.raises(CalibrationError, match=rf"{reason}; .*keep the layer BF16"):
        require_usable({fqn: Amax(weight, observed)}, {fqn: "nvfp4"})


def test_weights_alone_need_no_inputs() -> None:
    amaxes = {"mixer.up_proj": Amax(ONE, None)}
    require_usable(amaxes, {"mixer.up_proj": "nvfp4-w4a16"})
    with pytest.raises(CalibrationError, match="never observed"):
        require_usable(amaxes, {"mixer.up_proj": "fp8"})
