"""How a process leaves the others; what they tell each other is tested by real ones elsewhere."""

import pytest
import torch

from nvvl.model import processes


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
