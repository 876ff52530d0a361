"""What figures were measured on."""

import os

import torch

from nvvl.cpu import cpu_name


def describe_machine() -> dict[str, object]:
    """Say processor, cores, torch and its threads, and the load of the minute before."""
    return {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }
