"""One optimizer step of distillation, in CPU time: nvvl against BF16 training and ModelOpt.

    OMP_NUM_THREADS=1 python -m nvvl.benchmarks.qad_step [--tokens 4x128] [--rounds 7] [--json]

One random hybrid language model (hidden size 512), in one process:

* ``bf16``: the student's own loop without any rounding: forward, loss in chunks, backward, AdamW on
  FP32 masters. What quantization adds is measured against it.
* ``nvvl``: the same with every linear in NVFP4, weights rounded once a step.
* ``teacher``: the forward that both need once more.
* ``modelopt``: its ``QADTrainer`` on transformers' model of the same weights, teacher forward
  included, with the quantizer backend named: ``eager`` is ModelOpt's own CPU arithmetic (quantize
  and dequantize; it has no fake-quant for CPUs), ``nvvl`` is nvvl's kernels in its place. It trains
  the same tensors.

Rounds of the first three take turns, so that a change of load falls on all of them; ModelOpt's,
whose trainer has a loop of its own, follow in a row. Medians of CPU time are reported.
``ratio`` is nvvl over bf16, ``with_teacher`` both with a teacher forward.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from nvvl.distill.losses import Positions, chunked_loss
from nvvl.distill.optimize import Optimizer
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.student import Student
from nvvl.model.config import LanguageConfig
from nvvl.model.packing import Packing
from nvvl.model.processes import Processes
from nvvl.model.vlm import LanguageModel, NemotronNanoVL
from nvvl.quantize.amaxes import Amax
from nvvl.quantize.recipe import Format

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ModelOpt about newer versions of transformers and torch
    # ModelOpt first: its trainers import transformers themselves
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.plugins.transformers_trainer import QADTrainer
    from transformers import (
        NemotronHConfig,
        NemotronHForCausalLM,
        TrainerCallback,
        TrainingArguments,
    )

HYBRID: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "hybrid_override_pattern": "M-M-M*-M-M-M*-M-",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 4,
    "conv_kernel": 4,
    "chunk_size": 128,
    "eos_token_id": 12,
}
PREFIX = "language_model.backbone.layers."
Step = Callable[[], None]


def rename(name: str) -> str:
    """Return nvvl's name for a tensor of transformers' model."""
    return name.replace("model.", "backbone.", 1)


def make_models() -> tuple[NemotronNanoVL, NemotronHForCausalLM]:
    """Build nvvl's and transformers' model with the same weights, in bfloat16."""
    torch.manual_seed(0)
    stock = NemotronHForCausalLM(NemotronHConfig(**HYBRID)).bfloat16().eval()
    with torch.device("meta"):
        ours = LanguageModel(LanguageConfig.from_dict(HYBRID))
    weights = {rename(name): tensor for name, tensor in stock.state_dict().items()}
    ours.load_state_dict(weights, assign=True)
    teacher = SimpleNamespace(language_model=ours.eval().requires_grad_(False))
    return cast(NemotronNanoVL, teacher), stock


def list_linears(teacher: NemotronNanoVL) -> dict[str, Format]:
    linears: dict[str, Format] = {}
    for name, module in teacher.language_model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".mixer." in name:
            linears[f"language_model.{name}"] = "nvfp4"
    return linears


class PlainStudent(Student):
    """The student without rounding: what BF16 training costs in the same loop."""

    def _round(self, weights: Any) -> None:
        for name, weight in weights.items():
            self._parameters[name].data.copy_(weight)


def make_step(
    teacher: NemotronNanoVL, ids: Tensor, *, quantized: bool
) -> tuple[Step, frozenset[str]]:
    """Return a call that takes one optimizer step, teacher forward excluded, and what it trains."""
    model = teacher.language_model
    recipe = DistillRecipe(name="step", learning_rate=1e-6)
    formats = list_linears(teacher)
    amaxes = {fqn: Amax(torch.tensor(1.0), torch.tensor(8.0)) for fqn in formats}
    if not quantized:
        amaxes = {fqn: Amax(torch.tensor(1.0)) for fqn in formats}
    student = (Student if quantized else PlainStudent)(teacher, formats, amaxes, recipe)
    optimizer = Optimizer(student, recipe, Processes("cpu"))
    with torch.no_grad():
        packing = Packing.of([ids.shape[1]] * ids.shape[0])
        embeds = model.backbone.embeddings(ids.flatten()[None])
        theirs, _ = model.hidden_states(embeds, packing=packing)

    def step() -> None:
        hidden, _ = student.backbone(embeds, packing=packing)
        head = model.lm_head.weight
        loss = chunked_loss("kl", Positions(hidden[0], head), teacher=Positions(theirs[0], head))
        loss.backward()
        student.collect_gradients()
        optimizer.step(optimizer.gradient_norm())

    return step, frozenset(student.masters)


def make_teacher_forward(teacher: NemotronNanoVL, ids: Tensor) -> Step:
    packing = Packing.of([ids.shape[1]] * ids.shape[0])

    @torch.no_grad()
    def forward() -> None:
        model = teacher.language_model
        model.hidden_states(model.backbone.embeddings(ids.flatten()[None]), packing=packing)

    return forward


def time_modelopt(
    stock: NemotronHForCausalLM, ids: Tensor, backend: str, rounds: int, trained: frozenset[str]
) -> list[float]:
    """Return the CPU seconds of steps of ModelOpt's QADTrainer, the first one left out."""
    student = copy.deepcopy(stock).train()
    names = {f"language_model.{rename(name)}": p for name, p in student.named_parameters()}
    for name, parameter in names.items():
        parameter.requires_grad_(name in trained)
    assert trained <= names.keys()
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    for entry in config["quant_cfg"]:
        if "block_sizes" in entry.get("cfg", {}):
            entry["cfg"]["backend"] = backend
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(student, config, lambda model: model(ids))

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.process_time() - self.began)

    clock = Clock()
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids] * (rounds + 1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(ids),
            max_steps=rounds + 1,
            learning_rate=1e-6,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = QADTrainer(
            model=student,
            args=arguments,
            train_dataset=rows,
            distill_args={"teacher_model": stock},
            callbacks=[clock],
        )
        trainer.train()
    return clock.seconds[1:]


def register_eager() -> str:
    """Register ModelOpt's own CPU arithmetic as a backend."""
    from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    from nvvl.quantize.backend import _StraightThrough

    def rounded(x: Tensor, scale: Tensor) -> Tensor:
        quantized = NVFP4QTensor.quantize(x, 16, weights_scaling_factor_2=scale)
        packed = cast(Any, quantized[0])
        result: Tensor = packed.dequantize(
            dtype=x.dtype, scale=quantized[1], double_scale=scale, block_sizes={-1: 16}
        )
        return result

    def entrypoint(x: Tensor, quantizer: TensorQuantizer) -> Tensor:
        scale = cast(Tensor, quantizer.amax).float() / (6 * 448)
        result: Tensor = _StraightThrough.apply(x, rounded, scale)  # type: ignore[no-untyped-call]
        return result

    register_quant_backend("modelopt_eager", entrypoint)
    return "modelopt_eager"


def clock(step: Step) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def measure(tokens: str, rounds: int) -> dict[str, Any]:
    from nvvl.quantize.backend import NVFP4_BACKEND, register

    teacher, stock = make_models()
    batch, length = (int(part) for part in tokens.split("x"))
    ids = torch.randint(20, HYBRID["vocab_size"], (batch, length))
    plain, _ = make_step(teacher, ids, quantized=False)
    ours, trained = make_step(teacher, ids, quantized=True)
    steps = {
        "bf16": plain,
        "nvvl": ours,
        "teacher": make_teacher_forward(teacher, ids),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # kernels are compiled, memory is there
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(clock(step))
    register()
    for name, backend in (("nvvl", NVFP4_BACKEND), ("eager", register_eager())):
        times[f"modelopt, {name} backend"] = time_modelopt(stock, ids, backend, rounds, trained)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [one / two for one, two in zip(times["nvvl"], times["bf16"], strict=True)]
    own = medians["nvvl"] + medians["teacher"]
    return {
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "cpu_seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "with_teacher": round(own / (medians["bf16"] + medians["teacher"]), 3),
        "modelopt_over_nvvl": {
            name.removeprefix("modelopt, "): round(value / own, 2)
            for name, value in medians.items()
            if name.startswith("modelopt")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="One distillation step in CPU time.")
    parser.add_argument("--tokens", default="4x128", help="sequences x tokens of each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and ModelOpt about each other
        result = measure(arguments.tokens, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for name, seconds in result["cpu_seconds"].items():
        print(f"{name:28} {seconds:8.3f} CPU s a step")
    low, high = result["ratio_range"]
    print(f"nvvl over bf16: {result['ratio']} ({low} to {high}); both with teacher: ", end="")
    print(result["with_teacher"])
    for name, ratio in result["modelopt_over_nvvl"].items():
        print(f"ModelOpt's QADTrainer, {name}: {ratio} times nvvl's step with its teacher forward")


if __name__ == "__main__":
    main()
