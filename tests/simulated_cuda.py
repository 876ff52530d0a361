"""A CUDA device that is not there: its tensors say ``cuda:0`` and are computed on the CPU.

What only a GPU would find out is found out here too: an operation that is given tensors of both
devices, a tensor that was not brought back before ``numpy`` or a C function reads it. It knows
nothing of speed, of memory, or of kernels: numbers are those of the CPU.
"""

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)

# What torch asks of a device itself, in C++; a build for CPUs has none of it for CUDA. The last of
# these takes the place of torch's own, so that autograd takes the device for the accelerator.
SUPPORT = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Stream = c10::Stream;
  Device here() const { return Device(c10::DeviceType::CUDA, 0); }
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, here()); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, here()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
namespace at { using ::CUDAHooks; REGISTER_CUDA_HOOKS(CUDAHooks) }

namespace at::accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
}
"""

# These copy between devices, and these take indices from the CPU, on a GPU too.
COPYING = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class SimulatedTensor(Tensor):
    """A tensor that says it is on ``cuda:0``, and the CPU tensor that it is."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "SimulatedTensor":
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=CUDA,
        )
        tensor.on_cpu = on_cpu
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"cuda:0 {self.on_cpu!r}"

    def tolist(self) -> Any:
        return self.on_cpu.tolist()

    # by these two `nn.Module.to` knows that it has to exchange whole parameters
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["on_cpu"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> "SimulatedTensor":
        return SimulatedTensor(parts["on_cpu"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees the calls that have no tensor of the device yet: new ones, and copies to it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    given = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    if func is torch.ops.aten._fused_sdp_choice.default and given:
        return 0  # the plain one: the fused ones of CUDA are not here
    if func is torch.ops.aten.is_pinned.default:
        return False
    if func is torch.ops.aten._pin_memory.default:
        return args[0].clone()
    if given and func not in COPYING:
        # all but the indices
        mixed = [args[0], *args[2:3]] if func in INDEXING else tensors
        left = [t for t in mixed if not isinstance(t, SimulatedTensor) and t.dim()]
        if left:
            shapes = [tuple(t.shape) for t in left]
            raise RuntimeError(f"{func}: cuda:0 and cpu (shapes {shapes}) in one operation")
    wanted = kwargs.get("device")
    on_cuda = torch.device(wanted).type == "cuda" if wanted is not None else bool(given)
    if wanted is not None and on_cuda:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    owners = {id(tensor.on_cpu): tensor for tensor in given}

    def unwrap(value: Any) -> Any:
        return value.on_cpu if isinstance(value, SimulatedTensor) else value

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, SimulatedTensor):
            return value
        owner = owners.get(id(value))  # of an operation in place
        if owner is not None:
            return owner
        # a view is a tensor of inference mode where what it views is one, whatever the mode is now
        inference = (
            given[0].is_inference() if given and func.is_view else torch.is_inference_mode_enabled()
        )
        with torch.inference_mode(inference):
            return SimulatedTensor(value)

    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    return tree_map(wrap, result) if on_cuda else result


class _Stream:
    """A stream in which all is done already."""

    def __init__(self, *_: Any) -> None:
        self.cuda_stream = 0

    def wait_event(self, _: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *_: Any) -> None: ...


def build_support(folder: Path) -> Path:
    """Compile what a Python process has to be started with, as ``LD_PRELOAD``."""
    if shutil.which("g++") is None:
        pytest.fail("no C++ compiler for the simulated GPU; install g++ (Debian: g++)")
    root = Path(torch.__file__).parent
    source, library = folder / "support.cpp", folder / "support.so"
    source.write_text(SUPPORT)
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}"]
    command += [str(source), "-o", str(library), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, f"-Wl,-rpath,{root / 'lib'}"], check=True, timeout=300)
    return library


@contextlib.contextmanager
def _in_this_thread() -> Iterator[None]:
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` copies where the mode sees it
    try:
        with _Factories():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@contextlib.contextmanager
def simulated_cuda(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch find one CUDA device, in a process started with what `build_support` built."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "get_device_name", lambda *_: "simulated")
    patch.setattr(torch.cuda, "Stream", _Stream)
    patch.setattr(torch.cuda, "Event", _Stream)
    patch.setattr(torch.cuda, "current_stream", _Stream)
    patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
    cpu_generator = torch.Generator
    patch.setattr(torch, "Generator", lambda device=None: cpu_generator())
    patch.setattr(Tensor, "record_stream", lambda *_: None)
    begin: Callable[..., None] = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with _in_this_thread():
            begin(thread)

    patch.setattr(threading.Thread, "run", run)
    with _in_this_thread():
        yield
