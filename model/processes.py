"""The processes that work on one run: who they are, and what they tell each other.

``accelerate`` finds out how the program was started (alone, by ``torchrun`` or ``accelerate
launch``), picks the device of each process and carries the collectives: NCCL between GPUs, gloo
between CPU processes. Alone, nothing is set up and every sum is the number itself.
"""

import atexit
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from nvvl import errors
from nvvl.errors import HardwareError, NvvlError, ReportedError

# The main process may hash and write terabytes while the others wait; one that died is found out by
# whatever started them.
_PATIENCE = timedelta(days=1)

# A sharded model holds its group, whose threads are then not joined but have nothing left to do.
_LAST_WORK_S = 0.2


class Processes:
    """The processes of one run.

    Attributes:
        index: Of this one, from 0.
        count: How many there are.
        device: Where this one computes.
    """

    def __init__(self, device: torch.device | str, *, join: bool = True) -> None:
        """Join the other processes, if there are any.

        Args:
            device: ``cpu`` or ``cuda``; on ``cuda`` each process of several takes its own GPU.
            join: False stays alone, however the program was started.

        Raises:
            HardwareError: if there are fewer GPUs here than processes, or the environment does not
                say how many those are.
        """
        self.index, self.count = 0, 1
        self.device = torch.device(device)
        if join and read_count("WORLD_SIZE") > 1:
            if self.device.type == "cuda":
                _require_gpus(read_count("LOCAL_WORLD_SIZE"))
            from accelerate import Accelerator, InitProcessGroupKwargs

            patience = InitProcessGroupKwargs(timeout=_PATIENCE)
            self._accelerator = Accelerator(
                cpu=self.device.type == "cpu", kwargs_handlers=[patience]
            )
            atexit.register(_leave)
            self.index = self._accelerator.process_index
            self.count = self._accelerator.num_processes
            self.device = self._accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.index == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        if self.count == 1:
            return value
        total = self._accelerator.reduce(value.to(self.device), reduction="sum")
        assert isinstance(total, Tensor)
        return total.to(value.device)

    def max(self, value: Tensor) -> Tensor:
        """Return the elementwise largest of a tensor over the processes."""
        if self.count == 1:
            return value
        return self._stack(value).amax(0)

    def gather(self, value: Any) -> list[Any]:
        """Return what each process gave, in their order.

        Args:
            value: What JSON can hold; floats come back exactly.
        """
        if self.count == 1:
            return [value]
        text = json.dumps(value).encode()
        longest = int(self.max(torch.tensor(len(text))))
        row = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        return [json.loads(other.numpy().tobytes()) for other in self._stack(row)]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Do a part of the work on every process; an error on one ends all of them.

        Sections follow each other and are never one in another: every process goes through the
        same ones, and waits at the end of each for the others.

        Raises:
            NvvlError: on the main process, of the first process that has one.
            ReportedError: on the others.
        """
        if self.count == 1:
            yield
            return
        error = None
        try:
            yield
        except NvvlError as caught:
            error = caught
        said = self.gather(None if error is None else [type(error).__name__, str(error)])
        first = next((pair for pair in said if pair is not None), None)
        if first is None:
            return
        if not self.is_main:
            raise ReportedError(first[1]) from error
        if error is not None:
            raise error
        kind, message = first
        raise getattr(errors, kind)(message)

    def _stack(self, value: Tensor) -> Tensor:
        """Return the tensors of all processes, (count, ...)."""
        rows = self._accelerator.gather(value.to(self.device)[None])
        assert isinstance(rows, Tensor)
        return rows.to(value.device)


def _leave() -> None:
    """Leave the other CPU processes, if any were joined, while Python still runs.

    The threads of gloo let go of tensors, for which they need the interpreter; one that was late
    ended a finished process by SIGABRT. NCCL has no such threads, and its way to leave waits for
    the other processes, which for one that failed would be for ever.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
        time.sleep(_LAST_WORK_S)


def read_count(name: str) -> int:
    """Return a number of processes that whatever started this one has set; 1 if nothing did."""
    said = os.environ.get(name, "1")
    try:
        return int(said)
    except ValueError:
        raise HardwareError(
            f"{name}: required a number of processes, as torchrun sets it, got {said!r:.60}; unset "
            "it to run alone"
        ) from None


def _require_gpus(num_processes: int) -> None:
    num_gpus = torch.cuda.device_count()
    if num_processes > num_gpus:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # one line is enough
            raise ReportedError("too few GPUs")
        raise HardwareError(
            f"{num_processes} processes were started here, and there are {num_gpus} GPUs; start "
            f"{num_gpus} (torchrun --nproc-per-node), or pass --device cpu"
        )
