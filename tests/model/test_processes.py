"""How a process leaves the others; what they tell each other is tested by real ones elsewhere."""

import pytest
import torch

from nvvl.errors import HardwareError
from nvvl.model import processes
from nvvl.model.processes import Processes


@pytest.mark.parametrize(
    ("is_joined", "backend", "leaves"),
    [(True, "gloo", True), (True, "nccl", False), (False, "gloo", False)],
)
def test_a_process_that_failed_never_waits_for_the_other_gpus(
    is_joined: bool, backend: str, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[bool] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: is_joined)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    processes._leave()
    assert bool(left) == leaves


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_number_of_processes_that_is_none_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "abc")
    with pytest.raises(HardwareError, match=f"^{name}: required a number of processes.* 'abc'"):
        Processes("cuda")
