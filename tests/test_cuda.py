"""The paths of a GPU: on one where there is one (`pytest -m gpu`), else on a simulated one."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.blockwise import distill_blockwise
from nvvl.distill.execution import Execution
from nvvl.distill.precompute import precompute_logits
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.rotate import rotate
from nvvl.distill.train import distill
from nvvl.errors import HardwareError
from nvvl.export.verify import verify
from nvvl.model.generate import generate
from nvvl.model.processes import Processes
from nvvl.model.processor import Processor, collate
from nvvl.model.prompt import Message
from nvvl.quantize.load import load_any
from nvvl.quantize.presets import PRESETS
from nvvl.quantize.walk import quantize_checkpoint
from nvvl.reports.evaluate import Candidate, Options, evaluate
from nvvl.reports.suites import SUITES
from nvvl.tests.simulated_cuda import build_support, simulated_cuda

SIMULATED = "NVVL_TESTS_SIMULATED_CUDA"


def test_gpu_paths_on_a_simulated_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"LD_PRELOAD": str(build_support(tmp_path)), SIMULATED: "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"1\d passed", done.stdout), done.stdout


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give the name of the device on which the test then computes."""
    if SIMULATED in os.environ:
        import_module("nvvl.quantize.backend")  # else ModelOpt would ask for kernels of the GPU
        with simulated_cuda(monkeypatch):
            yield "cuda"
    else:
        assert torch.cuda.is_available(), "this test needs a CUDA device"
        yield "cuda"


@pytest.mark.gpu
def test_what_was_left_on_the_other_device_is_noticed(cuda: str) -> None:
    there = torch.ones(2, 2, device=cuda)
    with pytest.raises(RuntimeError):
        there @ torch.ones(2, 2)
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    with pytest.raises((RuntimeError, IndexError)):
        torch.ones(2, 2)[there.long()]
    with pytest.raises((RuntimeError, IndexError)):
        there[there > 0] = torch.ones(4)
    assert there[torch.tensor([1])].sum() == 2
    assert (there + torch.ones(2, 2).to(cuda)).cpu().numpy().sum() == 8


@pytest.fixture(scope="module")
def items() -> CalibrationSet:
    made = []
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        question = "<image>\n" * (index % 2) + "the thing in " * (1 + index % 3)
        messages = (Message("user", question), Message("assistant", f"answer {index * 7919}"))
        images = (Image.fromarray(pixels),) * (index % 2)
        made.append(Item(item_id=f"item {index}", messages=messages, images=images))
    return CalibrationSet(items=tuple(made), spec="test", num_requested=len(made))


@pytest.fixture(scope="module")
def run(
    tiny_checkpoint: Path, items: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("run") / "nvfp4"
    quantize_checkpoint(tiny_checkpoint, out, PRESETS["nvfp4"](), items)
    return out


def require_proved(folder: Path, source: Path) -> None:
    report = verify(folder, source, logits=False)
    failed = [check.rule for check in report.checks if check.passed is False]
    # rules about server configs (C, E) concern keys that the tiny config does not have
    assert [rule for rule in failed if not rule.startswith(("C", "E"))] == []


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["fp8", "nvfp4", "mixed", "nvfp4-w4a16"])
def test_run_is_proved_and_calibrated_as_on_the_cpu(
    preset: str, cuda: str, tiny_checkpoint: Path, items: CalibrationSet, tmp_path: Path
) -> None:
    here, there = tmp_path / "cpu", tmp_path / "gpu"
    quantize_checkpoint(tiny_checkpoint, here, PRESETS[preset](), items)
    quantize_checkpoint(tiny_checkpoint, there, PRESETS[preset](), items, device=cuda)
    expected = load_file(here / "calibration.amax")
    found = load_file(there / "calibration.amax")
    assert found.keys() == expected.keys()
    for name, amax in expected.items():
        # activations are bfloat16 (2**-8), and sums are made in another order
        torch.testing.assert_close(found[name], amax, rtol=0.03, atol=0)
    require_proved(there, tiny_checkpoint)


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
def test_answers_are_those_of_the_cpu(
    quantized: bool, cuda: str, tiny_checkpoint: Path, run: Path, items: CalibrationSet
) -> None:
    folder = run if quantized else tiny_checkpoint
    processor = Processor.from_folder(folder)
    prompts = [processor(item.messages[:1], images=item.images) for item in items.items[:4]]
    batch = collate(prompts, 0)
    answers = []
    for device in ("cpu", cuda):
        # in float32 no two tokens are near enough to be exchanged by the order of a sum
        model = load_any(folder, dtype=torch.float32, device=device)
        answers.append(generate(model, batch, eos_token_id=303, max_new_tokens=6))
    assert answers[0] == answers[1]


def make_recipe(**settings: Any) -> DistillRecipe:
    return DistillRecipe(
        name="test",
        learning_rate=1e-3,
        safe_learning_rate=1.0,
        num_steps=6,
        tokens_per_batch=160,
        num_validation_items=4,
        **settings,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [False, True])
def test_distillation_gets_better_and_is_proved(
    stored: bool,
    cuda: str,
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    tmp_path: Path,
) -> None:
    recipe = make_recipe(items_per_step=3, validate_every=3)
    logits = tmp_path / "logits" if stored else None
    if logits:
        precompute_logits(tiny_checkpoint, items, recipe, logits, device=cuda)
    how = Execution(device=cuda, logits=logits)
    result = distill(run, tiny_checkpoint, tmp_path / "out", recipe, items, execution=how)
    assert result is not None
    assert result.best_loss < result.start_loss
    require_proved(tmp_path / "out", result.bf16)


@pytest.mark.gpu
def test_distillation_a_layer_at_a_time(
    cuda: str, run: Path, tiny_checkpoint: Path, items: CalibrationSet, tmp_path: Path
) -> None:
    recipe, out = make_recipe(method="layers", items_per_step=8), tmp_path / "out"
    how = Execution(device=cuda)
    result = distill_blockwise(run, tiny_checkpoint, out, recipe, items, execution=how)
    assert len(result.layers) == 7
    require_proved(out, result.bf16)


@pytest.mark.gpu
def test_rotation_changes_no_answer(
    cuda: str, tiny_checkpoint: Path, items: CalibrationSet, tmp_path: Path
) -> None:
    result = rotate(
        tiny_checkpoint, tmp_path / "out", items, num_held_out=4, num_steps=5, device=cuda
    )
    assert 0 < result.harm < 1
    assert 0 <= result.kl < 1e-3


@pytest.mark.gpu
def test_evaluation_counts_as_on_the_cpu(
    cuda: str, run: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    results = []
    for device in ("cpu", cuda):
        options = Options(num_items=4, batch_size=2, gate_items=2, device=device)
        candidate = Candidate(folder=run, out=tmp_path / device, label=None)
        results += evaluate([candidate], [SUITES["line"]], options, teacher=tiny_checkpoint)
    cpu, gpu = results
    assert [a.item_id for a in gpu.answers] == [a.item_id for a in cpu.answers]
    for expected, found in zip(cpu.answers, gpu.answers, strict=True):
        if expected.kl is not None:
            # means over a few tokens of logits in bfloat16
            assert found.kl == pytest.approx(expected.kl, rel=0.1, abs=1e-3)


@pytest.mark.gpu
def test_scales_that_weigh_images_are_those_of_the_cpu(
    cuda: str, tiny_checkpoint: Path, items: CalibrationSet, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(PRESETS["fp8"](), image_weight=0.5)
    for device in ("cpu", cuda):
        quantize_checkpoint(tiny_checkpoint, tmp_path / device, recipe, items, device=device)
    expected = load_file(tmp_path / "cpu" / "calibration.amax")
    found = load_file(tmp_path / cuda / "calibration.amax")
    # each is chosen among a few, and where two are as good the order of a sum decides
    same = [torch.isclose(found[name], amax, rtol=0.03).item() for name, amax in expected.items()]
    assert sum(same) > 0.8 * len(same)
    require_proved(tmp_path / cuda, tiny_checkpoint)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(HardwareError, match=r"2 processes were started here, and there are 1 GPUs"):
        Processes("cuda")
