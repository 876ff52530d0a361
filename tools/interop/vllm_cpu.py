"""Serve one checkpoint with vLLM on a CPU and write what it answers. Knows nothing of nvvl.

    .venv-interop/bin/python tools/interop/vllm_cpu.py FOLDER REFERENCE.json OUT.json

Run as a program of its own: it imports vLLM and what comes with it, nothing of nvvl, so what it
writes is what a server makes of the folder alone. The folder is used as it is; no remote code.

Where vLLM's CPU build lacks something, it is given here, in this process:

* torchvision from PyPI is built for CUDA and asks beside CPU torch for two operators, which are
  declared; nothing calls them.
* The config class. The released folder brings one as remote code; ours is registered instead.
* FP8: q, k and v are requantized to one scale after loading, by an operator the CPU build has in
  another form. A torch version stands in for it.
* NVFP4: the emulation kernel, which rounds weights and activations as the format does, is not
  offered on CPU. It is registered.

Before loading, every weight is filled with NaN (packed bytes with a mark), and what still holds it
afterwards is reported: vLLM starts without complaint when it skipped a tensor.
"""

# ruff: noqa: E402  (the environment is set before vLLM is imported)
# pyright: reportMissingImports=false

import argparse
import importlib.metadata
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before vLLM is imported: the engine in this process, where the additions below are, and no
# compiler for its image preprocessing, which would take longer than all answers.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# One thread: two that wait for each other are slow where other programs want the processor too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch

for _operator in ("nms", "qnms"):
    torch.library.define(
        f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor"
    )

from PIL import Image
from transformers import AutoConfig, NemotronHConfig, PretrainedConfig
from vllm import LLM, SamplingParams, _custom_ops
from vllm.model_executor.kernels.linear import (
    EmulationNvFp4LinearKernel,
    register_linear_kernel,
)
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.nano_nemotron_vl import NemotronH_Nano_VL_V2
from vllm.platforms.interface import PlatformEnum

ARCHITECTURE = "NemotronH_Nano_VL_V2"
MAX_MODEL_LEN = 4096
_PACKED_MARK = 0x88  # two codes of minus zero, which no written weight consists of
_E4M3_MAX = 448.0
# Ones unless a folder has them, which this family's do not: layer scales of the vision tower, and
# scales of an attention in FP8.
_CONSTANT = ("ls1", "ls2", "q_scale", "k_scale", "v_scale", "prob_scale")


class NanoVLConfig(PretrainedConfig):  # type: ignore[misc]
    """The config as vLLM reads it: ``text_config`` and ``vision_config`` as objects."""

    model_type = ARCHITECTURE

    def __init__(
        self,
        llm_config: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        **values: Any,
    ) -> None:
        language = dict(llm_config or {})
        if "time_step_limit" in language:  # JSON has no infinity, so it may be written as text
            language["time_step_limit"] = [float(value) for value in language["time_step_limit"]]
        self.text_config = NemotronHConfig(**language)
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        super().__init__(**values)


class MarkingLoader(DefaultModelLoader):  # type: ignore[misc]
    """The default loader, which also finds the parameters that no tensor of the folder filled."""

    never_filled: tuple[str, ...] | None = None

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format="safetensors"))

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Mark every parameter, load, and list those that still hold the mark."""
        parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.rpartition(".")[2] not in _CONSTANT
        }
        # Some scales start at a value that vLLM tells "not in the folder" by, so they keep it.
        scales = {
            name: parameter.detach().clone()
            for name, parameter in parameters.items()
            if "scale" in name.rpartition(".")[2]
        }
        for name in parameters.keys() - scales.keys():
            is_packed = parameters[name].dtype == torch.uint8
            parameters[name].data.fill_(_PACKED_MARK if is_packed else float("nan"))
        super().load_weights(model, model_config)
        MarkingLoader.never_filled = tuple(
            name
            for name, parameter in parameters.items()
            if _is_unfilled(parameter.detach(), scales.get(name))
        )


def _is_unfilled(parameter: torch.Tensor, before: torch.Tensor | None) -> bool:
    if before is not None:
        return torch.equal(parameter.float().nan_to_num(), before.float().nan_to_num())
    if parameter.dtype == torch.uint8:
        return bool((parameter == _PACKED_MARK).flatten(1).all(-1).any())
    return bool(parameter.float().isnan().any())


def scaled_fp8_quant(
    values: torch.Tensor, scale: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with one given scale, as `vllm._custom_ops.scaled_fp8_quant` does elsewhere."""
    if scale is None or any(value is not None for value in options.values()):
        raise NotImplementedError(f"only one given scale is supported here, got {options}")
    codes = (values.float() / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale


def prepare_vllm() -> None:
    """Give vLLM's CPU build what it lacks."""
    AutoConfig.register(ARCHITECTURE, NanoVLConfig)
    # By class: a name would be looked up in a process of its own, without the declared operators.
    ModelRegistry.register_model(ARCHITECTURE, NemotronH_Nano_VL_V2)
    register_model_loader("marking")(MarkingLoader)
    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    _custom_ops.scaled_fp8_quant = scaled_fp8_quant


def serve(folder: Path, reference_path: Path) -> dict[str, Any]:
    """Load a folder, score the scored prompts and answer the asked ones.

    Args:
        folder: A checkpoint.
        reference_path: What `nvvl.tools.interop.reference` wrote, images beside it.

    Returns:
        Log-probabilities, answers, the token ids that vLLM made of each prompt, what was never
        filled, and versions.
    """
    reference = json.loads(reference_path.read_text(encoding="utf-8"))
    prepare_vllm()
    llm = LLM(
        model=str(folder),
        load_format="marking",
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=16,
        limit_mm_per_prompt={"image": 2, "video": 0},
    )
    scored = llm.generate(
        [
            {"prompt_token_ids": entry["prompt_ids"], **_media(entry, reference_path)}
            for entry in reference["scored"]
        ],
        SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
    )
    asked = llm.generate(
        [
            {"prompt": entry["prompt"], **_media(entry, reference_path)}
            for entry in reference["asked"]
        ],
        [
            SamplingParams(temperature=0.0, max_tokens=entry["max_new_tokens"])
            for entry in reference["asked"]
        ],
    )
    names = [entry["id"] for entry in reference["scored"]]
    asked_names = [entry["id"] for entry in reference["asked"]]
    return {
        "versions": {
            name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")
        },
        "never_filled": MarkingLoader.never_filled,
        "logprobs": {
            name: _prompt_logprobs(output) for name, output in zip(names, scored, strict=True)
        },
        "answers": {
            name: output.outputs[0].text.strip()
            for name, output in zip(asked_names, asked, strict=True)
        },
        "prompt_ids": {
            name: list(output.prompt_token_ids)
            for name, output in zip([*names, *asked_names], [*scored, *asked], strict=True)
        },
    }


def _media(entry: dict[str, Any], reference_path: Path) -> dict[str, Any]:
    images = [Image.open(reference_path.parent / name).convert("RGB") for name in entry["images"]]
    return {"multi_modal_data": {"image": images}} if images else {}


def _prompt_logprobs(output: Any) -> list[float]:
    """Return the log-probability of each prompt token but the first."""
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [float(candidates[token].logprob) for token, candidates in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve one checkpoint with vLLM on a CPU.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    result = serve(arguments.folder, arguments.reference)
    arguments.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
