"""The processes that train together: who they are, and sums over them.

``accelerate`` finds out how the program was started (alone, by ``torchrun`` or ``accelerate
launch``), picks the device of each process and carries the collectives: NCCL between GPUs, gloo
between CPU processes. Alone, nothing is set up and every sum is the number itself.
"""

import os

import torch
from torch import Tensor


class Processes:
    """The processes of one run.

    Attributes:
        index: Of this one, from 0.
        count: How many there are.
        device: Where this one computes.
    """

    def __init__(self, device: torch.device | str) -> None:
        """Join the other processes, if there are any.

        Args:
            device: ``cpu`` or ``cuda``; on ``cuda`` each process of several takes its own GPU.
        """
        self.index, self.count = 0, 1
        self.device = torch.device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=self.device.type == "cpu")
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
        all_values = self._accelerator.gather(value.to(self.device)[None])
        assert isinstance(all_values, Tensor)
        return all_values.amax(0).to(value.device)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()
