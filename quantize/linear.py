"""A linear as a quantized checkpoint stores it, and the arithmetic servers do with it.

The tensors are buffers with the names and dtypes they have on disk. The weight is dequantized once,
after loading; inputs are quantized and dequantized on every call, with the stored scale. Products
are then formed in the compute dtype, which is what a simulation on a CPU can do: it has the
rounding of the format, not the speed.
"""

import torch
from torch import Tensor, nn

from nvvl.model.products import linear
from nvvl.model.safetensors_io import torch_dtypes
from nvvl.quantize import fp8, fp8_rows, nvfp4
from nvvl.quantize.layout import StoredFormat, linear_tensors
from nvvl.quantize.targets import LinearShape


class QuantizedLinear(nn.Module):
    """``y = q(x) W^T`` with W from packed codes and q the rounding of the input format.

    Attributes:
        linear_format: Format of weight and input.
        in_features: K.
        out_features: N.
        bias: (N,) or None; stored as it is, and only vision linears have one.
        dense_weight: (N, K) dequantized weight, which `prepare` puts in the place of its codes and
            their scales.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor
    input_scale: Tensor
    bias: nn.Parameter | None
    dense_weight: Tensor | None

    def __init__(
        self, shape: LinearShape, linear_format: StoredFormat, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.linear_format = linear_format
        self.out_features, self.in_features = shape
        for spec in linear_tensors("", shape, linear_format):
            empty = torch.empty(spec.shape, dtype=torch_dtypes()[spec.dtype])
            self.register_buffer(spec.name.removeprefix("."), empty)
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0])) if bias else None)
        self.register_buffer("dense_weight", None)

    def prepare(self, dtype: torch.dtype) -> None:
        """Dequantize the weight, once its tensors are loaded, and let go of its codes.

        Beside the dequantized weight they would take half as much again.

        Args:
            dtype: Of the products: bfloat16, float16 or float32.
        """
        if self.linear_format == "fp8":
            self.dense_weight = fp8.dequantize(self.weight, self.weight_scale, dtype)
        elif self.linear_format == "fp8-per-channel":
            self.dense_weight = fp8_rows.dequantize(self.weight, self.weight_scale, dtype)
        else:
            self.dense_weight = nvfp4.dequantize(
                self.weight, self.weight_scale, self.weight_scale_2, dtype
            )
        for name in ("weight", "weight_scale", "weight_scale_2"):
            self._buffers.pop(name, None)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (..., K) to (..., N).

        Raises:
            RuntimeError: if `prepare` was not called.
        """
        if self.dense_weight is None:
            raise RuntimeError("QuantizedLinear: call prepare() after loading its tensors")
        if self.linear_format == "fp8":
            x = fp8.fake_quantize(x, self.input_scale)
        elif self.linear_format == "fp8-per-channel":
            x = fp8_rows.fake_quantize(x)
        elif self.linear_format == "nvfp4":
            x = nvfp4.fake_quantize(x, self.input_scale)
        return linear(x, self.dense_weight, self.bias)

    def extra_repr(self) -> str:
        """Say shape and format."""
        return f"{self.in_features}, {self.out_features}, {self.linear_format}"
