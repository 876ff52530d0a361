"""Proof that every number of a quantized checkpoint follows from its source and its calibration.

Tensors are seen one at a time. What is not quantized must equal the source byte for byte. A
quantized weight is made again from the source by `nvvl.export.codes` and must equal what was
written, code by code and block scale by block scale; tensor scales must be the calibrated amax
divided by the format's largest value; the amax itself must be the largest magnitude of the weight,
taken over q, k and v together. Weights are calibrated and packed in bfloat16, so a source of
another dtype is rounded to it first. Last, the dequantized weight must be close to the source as it
is stored: this needs no exact formula, so it also catches a formula that both writings got wrong.

The floors in dB are set from measurement on 512 x 1024 bfloat16 matrices: FP8 gives 31.4 to 31.8
and NVFP4 19.9 to 21.0 for normal, uniform, Laplace and Student-t (3) values, more with outliers.
Worst cases, every value halfway between two codes, are near 24 and 14. The floors lie 3 to 4 dB
below what weights give.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from nvvl.export import codes
from nvvl.export.checks import Check, judge, not_checked
from nvvl.export.exclude_patterns import FUSED
from nvvl.export.view import Stored

SQNR_FLOOR_DB: Mapping[str, float] = {"fp8": 28.0, "nvfp4": 16.0}
FORMAT_MAX: Mapping[str, float] = {"fp8": codes.E4M3_MAX, "nvfp4": codes.NVFP4_MAX}

# Rows are compared in pieces of about this many elements: 16 MB a float32 temporary.
_PIECE = 1 << 22

_CHECKS = {
    "copied": ("V1", "16-bit tensors equal the source byte for byte"),
    "codes": ("V2", "weight codes follow from source and amax"),
    "blocks": ("V3", "block scales follow from source and amax"),
    "scales": ("V4", "tensor and input scales are the calibrated amax / format maximum"),
    "amax": ("V5", "weight amax is the largest magnitude in the source"),
    "finite": ("D7", "no NaN and no infinity in any tensor, every block scale above zero"),
    "sqnr": ("D9", "dequantized weights are close to the source"),
}


@dataclass
class ValueProof:
    """Collects faults tensor by tensor, then states them as checks.

    Attributes:
        calibration: The amax values of calibration.amax by name; None if there is none.
        has_source: Whether source tensors will be given.
        sqnr_db: Signal to quantization noise of each dequantized weight seen so far.
    """

    calibration: Mapping[str, float] | None
    has_source: bool
    sqnr_db: dict[str, float] = field(default_factory=dict)
    _faults: dict[str, list[str]] = field(default_factory=lambda: {key: [] for key in _CHECKS})
    _formats: dict[str, Stored] = field(default_factory=dict)
    _source_amax: dict[str, float] = field(default_factory=dict)
    _used_amax: set[str] = field(default_factory=set)

    def see_copied(self, name: str, tensor: Tensor, source: Tensor | None) -> None:
        """Take in a tensor that is not quantized.

        Args:
            name: its name.
            tensor: as written.
            source: the source's tensor of that name, or None if it has none.
        """
        self._see_finite(name, tensor)
        if source is None:
            return
        if (tensor.dtype, tensor.shape) != (source.dtype, source.shape):
            self._fault(
                "copied",
                f"{name}: {_describe(tensor)}, the source has {_describe(source)}",
            )
        elif not torch.equal(_bytes(tensor), _bytes(source)):
            self._fault("copied", f"{name}: {_describe_difference(_bytes(tensor), _bytes(source))}")

    def see_linear(self, fqn: str, parts: Mapping[str, Tensor], source: Tensor | None) -> None:
        """Take in a quantized linear.

        Args:
            fqn: module name.
            parts: its tensors by leaf name: weight and whatever scales there are.
            source: (N, K) weight of the source in its stored dtype, or None.
        """
        stored: Stored = "nvfp4" if parts["weight"].dtype == torch.uint8 else "fp8"
        for leaf, tensor in parts.items():
            if tensor.dtype != torch.uint8:
                self._see_finite(f"{fqn}.{leaf}", tensor)
        if stored == "nvfp4" and "weight_scale" in parts:
            self._see_positive(f"{fqn}.weight_scale", parts["weight_scale"])
        self._see_scales(fqn, stored, parts)
        if source is not None and source.dtype.is_floating_point:
            # as of the rounded weight, because rounding keeps the order
            amax = torch.stack(source.aminmax()).abs().max()
            self._source_amax[fqn] = float(amax.bfloat16())
            self._see_weight(fqn, stored, parts, source)

    def checks(self) -> list[Check]:
        """State what was found, once every tensor has been seen."""
        self._faults["amax"] += self._amax_faults()
        without_source = "needs the source"
        without_calibration = "the folder has no calibration.amax"
        checks = []
        for key, (rule, name) in _CHECKS.items():
            if not self.has_source and key in ("copied", "codes", "blocks", "amax", "sqnr"):
                checks.append(not_checked(rule, name, without_source))
            elif self.calibration is None and key in ("scales", "amax"):
                checks.append(not_checked(rule, name, without_calibration))
            else:
                note = self._describe_sqnr() if key == "sqnr" else "ok"
                checks.append(judge(rule, name, self._faults[key], note=note))
        return checks

    def _fault(self, key: str, fault: str) -> None:
        self._faults[key].append(fault)

    def _see_finite(self, name: str, tensor: Tensor) -> None:
        if not tensor.dtype.is_floating_point:
            return
        pieces = tensor.reshape(-1).split(_PIECE)
        count = sum(int((~torch.isfinite(piece.float())).sum()) for piece in pieces)
        if count:
            self._fault("finite", f"{name}: {count} values are NaN or infinite")

    def _see_positive(self, name: str, tensor: Tensor) -> None:
        count = int((tensor.float() <= 0).sum())
        if count:
            self._fault("finite", f"{name}: {count} values are zero or negative")

    def _see_scales(self, fqn: str, stored: Stored, parts: Mapping[str, Tensor]) -> None:
        if self.calibration is None:
            return
        tensor_scale = "weight_scale_2" if stored == "nvfp4" else "weight_scale"
        for leaf, key in ((tensor_scale, "weight_amax"), ("input_scale", "input_amax")):
            if leaf not in parts:
                continue
            amax = self._amax(f"{fqn}.{key}")
            if amax is None:
                self._fault("scales", f"{fqn}.{leaf}: calibration.amax has no {fqn}.{key}")
                continue
            wanted = codes.scale_of(amax, FORMAT_MAX[stored])
            if parts[leaf].numel() != 1 or float(parts[leaf].float()) != wanted:
                self._fault(
                    "scales",
                    f"{fqn}.{leaf}: {parts[leaf].float().flatten()[:1].tolist()}, required "
                    f"{wanted} = {amax} / {FORMAT_MAX[stored]:g}",
                )

    def _see_weight(
        self, fqn: str, stored: Stored, parts: Mapping[str, Tensor], source: Tensor
    ) -> None:
        scale = self._weight_scale(fqn, stored, parts)
        if scale is None or not _fits(stored, parts, source):
            self._fault("codes", f"{fqn}.weight: shapes or scales do not fit the source")
            return
        wrong = {"codes": _Mismatch(), "blocks": _Mismatch()}
        noise = signal = 0.0
        for rows in _pieces(source):
            piece = {leaf: t[rows] if t.dim() == 2 else t for leaf, t in parts.items()}
            rounded = source[rows].bfloat16()
            for key, (got, wanted) in _compare(stored, piece, rounded, scale).items():
                wrong[key].add(got, wanted, rows.start)
            values = _decode(stored, piece)
            original = source[rows].double()
            noise += float((values.double() - original).square().sum())
            signal += float(original.square().sum())
        for key, leaf in (("codes", "weight"), ("blocks", "weight_scale")):
            if wrong[key].count:
                self._fault(key, f"{fqn}.{leaf}: {wrong[key]}")
        self._see_sqnr(fqn, stored, signal, noise)

    def _see_sqnr(self, fqn: str, stored: Stored, signal: float, noise: float) -> None:
        sqnr_db = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf
        if math.isnan(noise) or (signal == 0 and noise > 0):
            sqnr_db = -math.inf
        self.sqnr_db[fqn], self._formats[fqn] = sqnr_db, stored
        if not sqnr_db >= SQNR_FLOOR_DB[stored]:
            self._fault(
                "sqnr",
                f"{fqn}.weight: {sqnr_db:.1f} dB, required {SQNR_FLOOR_DB[stored]:g} dB",
            )

    def _weight_scale(self, fqn: str, stored: Stored, parts: Mapping[str, Tensor]) -> float | None:
        """Return the tensor scale the codes were made with: from the amax, else as stored."""
        amax = self._amax(f"{fqn}.weight_amax")
        if amax is not None:
            return codes.scale_of(amax, FORMAT_MAX[stored])
        stored_scale = parts.get("weight_scale_2" if stored == "nvfp4" else "weight_scale")
        if stored_scale is None or stored_scale.numel() != 1:
            return None
        return float(stored_scale)

    def _amax(self, name: str) -> float | None:
        if self.calibration is None or name not in self.calibration:
            return None
        self._used_amax.add(name)
        return self.calibration[name]

    def _amax_faults(self) -> Iterator[str]:
        if self.calibration is None or not self.has_source:
            return
        for name in sorted(self.calibration.keys() - self._used_amax):
            yield f"{name}: in calibration.amax, but of no quantized linear"
        for fqn in self._source_amax:
            stored = self.calibration.get(f"{fqn}.weight_amax")
            wanted = max(self._source_amax.get(part, 0.0) for part in _sharing(fqn))
            if stored is not None and stored != wanted:
                yield f"{fqn}.weight_amax: {stored}, the source's largest magnitude is {wanted}"

    def _describe_sqnr(self) -> str:
        parts = []
        for stored in sorted(set(self._formats.values())):
            values = [value for fqn, value in self.sqnr_db.items() if self._formats[fqn] == stored]
            parts.append(
                f"{stored} {len(values)} linears, least {min(values):.1f} dB, "
                f"median {median(values):.1f} dB"
            )
        return "; ".join(parts) or "nothing is quantized"


@dataclass
class _Mismatch:
    """Counts bytes that differ and remembers the first."""

    count: int = 0
    first: str = ""

    def add(self, got: Tensor, wanted: Tensor, first_row: int) -> None:
        differs = _bytes(got).ne(_bytes(wanted)).view(got.shape)
        count = int(differs.sum())
        if count and not self.count:
            row, column = (int(i) for i in differs.nonzero()[0])
            self.first = (
                f"first at [{first_row + row}, {column}]: "
                f"{int(_as_uint8(got)[row, column]):#04x}, "
                f"required {int(_as_uint8(wanted)[row, column]):#04x}"
            )
        self.count += count

    def __str__(self) -> str:
        return f"{self.count} bytes differ, {self.first}"


def _compare(
    stored: Stored, parts: Mapping[str, Tensor], source: Tensor, scale: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair what was written with what it must be."""
    if stored == "fp8":
        return {"codes": (parts["weight"], codes.encode_fp8(source, scale))}
    packed, block_scale = codes.encode_nvfp4(source, scale)
    return {
        "codes": (parts["weight"], packed),
        "blocks": (parts["weight_scale"], block_scale),
    }


def _decode(stored: Stored, parts: Mapping[str, Tensor]) -> Tensor:
    if stored == "fp8":
        return codes.decode_fp8(parts["weight"], float(parts["weight_scale"]))
    return codes.decode_nvfp4(
        parts["weight"], parts["weight_scale"], float(parts["weight_scale_2"])
    )


def _fits(stored: Stored, parts: Mapping[str, Tensor], source: Tensor) -> bool:
    """Whether the tensors have the shapes and dtypes that codes of this source need."""
    if source.dim() != 2:
        return False
    rows, columns = source.shape
    scalar = ((), torch.float32)
    if stored == "fp8":
        wanted = {"weight": ((rows, columns), torch.float8_e4m3fn), "weight_scale": scalar}
    else:
        if columns % codes.BLOCK_SIZE:
            return False
        blocks = (rows, columns // codes.BLOCK_SIZE)
        wanted = {
            "weight": ((rows, columns // 2), torch.uint8),
            "weight_scale": (blocks, torch.float8_e4m3fn),
            "weight_scale_2": scalar,
        }
    return all(
        leaf in parts and (tuple(parts[leaf].shape), parts[leaf].dtype) == expected
        for leaf, expected in wanted.items()
    )


def _pieces(weight: Tensor) -> Iterator[slice]:
    step = max(1, _PIECE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _sharing(fqn: str) -> tuple[str, ...]:
    """Return the linears that share this one's weight amax."""
    mixer, _, leaf = fqn.rpartition(".")
    return tuple(f"{mixer}.{part}" for part in FUSED) if leaf in FUSED else (fqn,)


def _as_uint8(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _describe_difference(got: Tensor, wanted: Tensor) -> str:
    count, first = 0, 0
    for start in range(0, len(got), _PIECE):
        differs = got[start : start + _PIECE].ne(wanted[start : start + _PIECE])
        found = int(differs.count_nonzero())
        if found and not count:
            first = start + int(differs.to(torch.uint8).argmax())
        count += found
    return f"{count} bytes differ, first at byte {first}"
