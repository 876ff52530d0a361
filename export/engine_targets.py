"""Which GPU an engine can be built for, in which precision, by which of the two builders.

TensorRT-RTX compiles ahead of time and needs no GPU; what it takes was found by building (1.7, one
graph of each precision for each target). For sm75 it takes float16 alone, which these graphs are
not. It has no target for H100, H200, B200, B300 and Jetson:
for these, TensorRT builds on a machine that has such a GPU. Its rows below are what the hardware
has units for; no such build has been run here.

A builder would refuse an impossible pair only after minutes of work, with a message about data
types; so the pair is refused before anything is read.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from nvvl.errors import EngineError, HardwareError

Precision = Literal["fp32", "bf16", "fp8", "nvfp4"]
BuilderName = Literal["tensorrt-rtx", "tensorrt"]


@dataclass(frozen=True, kw_only=True)
class Builder:
    """One of the two programs that make engines from ONNX graphs.

    Attributes:
        name: As the user says it.
        module: The Python package.
        extra: What to install.
        targets: By precision, the targets it can build for.
        needs_gpu: Whether it builds only for the GPU it finds.
    """

    name: BuilderName
    module: str
    extra: str
    targets: Mapping[Precision, tuple[str, ...]]
    needs_gpu: bool

    @property
    def all_targets(self) -> tuple[str, ...]:
        """Every target it knows, in ascending order."""
        return self.targets["fp32"]

    def describe_targets(self) -> str:
        """Return the table of precisions and targets as one line."""
        rows = (f"{precision} for {', '.join(row)}" for precision, row in self.targets.items())
        return "; ".join(rows)


TENSORRT_RTX = Builder(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    extra="tensorrt-rtx",
    targets={
        "fp32": ("sm80", "sm86", "sm89", "sm120", "sm121"),
        "bf16": ("sm80", "sm86", "sm89", "sm120", "sm121"),
        "fp8": ("sm89", "sm120", "sm121"),
        "nvfp4": ("sm120", "sm121"),
    },
    needs_gpu=False,
)
TENSORRT = Builder(
    name="tensorrt",
    module="tensorrt",
    extra="tensorrt",
    targets={
        "fp32": (
            *("sm75", "sm80", "sm86", "sm87", "sm89", "sm90"),
            *("sm100", "sm103", "sm110", "sm120", "sm121"),
        ),
        "bf16": (
            *("sm80", "sm86", "sm87", "sm89", "sm90"),
            *("sm100", "sm103", "sm110", "sm120", "sm121"),
        ),
        "fp8": ("sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121"),
        "nvfp4": ("sm100", "sm103", "sm110", "sm120", "sm121"),
    },
    needs_gpu=True,
)
BUILDERS: Mapping[str, Builder] = {builder.name: builder for builder in (TENSORRT_RTX, TENSORRT)}


def require_targets(
    builder: Builder, targets: Sequence[str], precisions: Collection[Precision]
) -> None:
    """Refuse targets that the builder does not know, or that lack a precision of the model.

    Args:
        builder: Who would build.
        targets: Such as ``sm120``; all of them go into one engine.
        precisions: Every precision of the graphs.

    Raises:
        EngineError: naming the pair, with everything that is possible.
    """
    if not targets:
        raise EngineError(
            f"--target: {builder.name} needs at least one of {', '.join(builder.all_targets)}"
        )
    for target in targets:
        if target not in builder.all_targets:
            elsewhere = [b.name for b in BUILDERS.values() if target in b.all_targets]
            way_out = (
                f"; --builder {elsewhere[0]} builds it, on a machine with that GPU"
                if elsewhere
                else ""
            )
            raise EngineError(
                f"--target {target}: {builder.name} builds for "
                f"{', '.join(builder.all_targets)}{way_out}"
            )
        for precision in sorted(precisions):
            if target not in builder.targets[precision]:
                raise EngineError(
                    f"--target {target}: it has no {precision}, which this checkpoint holds; "
                    f"{builder.name} builds {builder.describe_targets()}"
                )


def require_cache(builder: Builder, kv_cache: str, kv_dtype: str) -> None:
    """Refuse a cache that is known to crash the builder.

    TensorRT-RTX 1.7's compiler, building for sm120, ends with a segmentation fault on the decode
    graph of a cache of fixed capacity in FP8; prefill, and both graphs of a growing one, it builds.

    Raises:
        EngineError: naming the way out.
    """
    if builder is TENSORRT_RTX and (kv_cache, kv_dtype) == ("fixed", "fp8"):
        raise EngineError(
            f"{builder.name} crashes on an FP8 cache of fixed capacity; export graphs with "
            'kv_cache = "growing" in --recipe, or with kv_dtype = "same"'
        )


def choose_builder(name: str, targets: Sequence[str]) -> tuple[Builder, tuple[str, ...]]:
    """Return a builder that is installed, and what it is to build for.

    Args:
        name: ``tensorrt-rtx`` or ``tensorrt``.
        targets: As the user gave them; TensorRT takes the GPU of this machine if there are none.

    Raises:
        HardwareError: if the builder is not installed, or needs a GPU that is not here.
        EngineError: if targets are unknown, or are not the GPU of this machine.
    """
    builder = BUILDERS[name]
    if targets or not builder.needs_gpu:
        require_targets(builder, targets, ())
    if builder.needs_gpu:
        found = find_gpu_target()
        if targets and tuple(targets) != (found,):
            raise EngineError(
                f"--target {', '.join(targets)}: {builder.name} builds for the GPU of this "
                f"machine, which is {found}; leave --target out, or build on the other machine"
            )
        targets = (found,)
    if find_spec(builder.module) is None:
        raise HardwareError(
            f"{builder.name} is not installed; install it with: pip install 'nvvl[{builder.extra}]'"
        )
    return builder, tuple(dict.fromkeys(targets))


def find_gpu_target() -> str:
    """Return the target of this machine's first GPU, such as ``sm90``.

    Raises:
        HardwareError: if there is no GPU or no driver.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
    except pynvml.NVMLError as error:
        raise HardwareError(
            "--builder tensorrt: it builds only on a machine with the GPU and driver the engine "
            f"is for, and none was found here ({error}); build there, or use --builder "
            "tensorrt-rtx, which needs no GPU"
        ) from None
    return f"sm{major}{minor}"
