"""The resumable state of training, in one safetensors file written beside and renamed."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def save_state(
    path: Path,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    *,
    stage: str,
    step: int,
) -> None:
    """Write weights, optimizer moments and the place in the plan."""
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    beside = path.with_suffix(".partial")
    save_file(tensors, beside, metadata={"place": json.dumps({"stage": stage, "step": step})})
    os.replace(beside, path)


def load_state(
    path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[str | None, int]:
    """Load what `save_state` wrote; returns the stage and step to go on with, or (None, 0)."""
    if not path.exists():
        return None, 0
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        place = json.loads(file.metadata()["place"])
    module.load_state_dict(
        {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("module.")}
    )
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        prefix = f"optimizer.{number}."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                index, key = name[len(prefix) :].split(".")
                state.setdefault(int(index), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return place["stage"], place["step"]
