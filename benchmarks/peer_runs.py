"""One run of one tool, for ``benchmarks/peers.py``: a process of its own, imports first, then time.

    python -P benchmarks/peer_runs.py TOOL FORMAT MODEL OUT WORK

Writes ``WORK/result.json``. Only the run of nvvl imports nvvl, because llm-compressor lives in an
environment that has none.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What nvvl leaves BF16 too; norm_f is a vector that model_free_ptq takes for a linear.
LEFT_OUT = [
    "re:.*vision_model.*",
    "re:.*mlp1.*",
    "re:.*lm_head.*",
    "re:.*embeddings.*",
    "re:.*conv1d.*",
    "re:.*norm_f$",
]


class Stopwatch:
    """Wall and CPU seconds of named phases, from the moment it is made."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self.startup_s = time.process_time()

    def time(self, phase: str, call: Callable[[], Any]) -> Any:
        """Make a call and count its seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        self.phases[phase] = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
        }
        return result

    def to_dict(self, *counted: str) -> dict[str, Any]:
        """Return all phases, and the sums of those that are compared."""
        values: dict[str, Any] = {"phases": self.phases, "startup_cpu_s": self.startup_s}
        for key in ("wall_s", "cpu_s"):
            values[key] = sum(self.phases[phase][key] for phase in counted)
        return values


def run_nvvl(preset: str, model: Path, out: Path, work: Path) -> dict[str, Any]:
    """Quantize the whole checkpoint as ``nvvl quantize`` does."""
    import torch._dynamo  # noqa: F401  torch imports it when a model without weights is made

    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.model.safetensors_io import read_header, read_tensor
    from nvvl.quantize.amaxes import CALIBRATION_NAME
    from nvvl.quantize.limits import default_limits
    from nvvl.quantize.presets import load_recipe
    from nvvl.quantize.recipe import CALIBRATED_FORMATS
    from nvvl.quantize.walk import quantize_checkpoint

    calibrated = preset in CALIBRATED_FORMATS
    if calibrated:
        import modelopt.torch.quantization  # noqa: F401  the walk imports it when it calibrates
    recipe = load_recipe(preset)  # type: ignore[arg-type]
    watch = Stopwatch()

    def quantize() -> None:
        items = load_calibration_set(work / "texts.jsonl", num_items=8) if calibrated else None
        quantize_checkpoint(model, out, recipe, items, limits=default_limits())

    watch.time("quantize", quantize)
    header = read_header(out / CALIBRATION_NAME)
    result = watch.to_dict("quantize")
    result["linears"] = sum(name.endswith(".weight_amax") for name in header)
    if calibrated:
        result["amaxes"] = {
            name.removesuffix(".input_amax").partition("layers.")[2]: float(read_tensor(info))
            for name, info in header.items()
            if name.endswith(".input_amax")
        }
    return result


def run_modelopt(preset: str, model: Path, out: Path, work: Path) -> dict[str, Any]:
    """Calibrate transformers' model with ModelOpt's own config, and export it."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import NemotronHForCausalLM

    ids = [torch.tensor([row]) for row in json.loads((work / "ids.json").read_text())]
    config = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}[preset]
    watch = Stopwatch()
    network: Any = watch.time(
        "load", lambda: NemotronHForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    )
    for module in network.modules():  # time steps as servers and nvvl have them
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))

    def forward(network: Any) -> None:
        for row in ids:
            network(row, use_cache=False)

    with torch.inference_mode():
        watch.time("calibrate", lambda: mtq.quantize(network, config, forward))
    amaxes = {
        name.removesuffix(".input_quantizer").partition("layers.")[2]: float(module.amax)
        for name, module in network.named_modules()
        if name.endswith(".input_quantizer") and module.is_enabled and module.amax is not None
    }
    with torch.inference_mode():
        watch.time("export", lambda: export_hf_checkpoint(network, export_dir=out))
    result = watch.to_dict("calibrate", "export")
    return result | {"linears": len(amaxes), "amaxes": amaxes}


def run_llm_compressor(_preset: str, model: Path, out: Path, _work: Path) -> dict[str, Any]:
    """Convert the checkpoint without data, as its documentation says, with one worker."""
    # of another environment, so it is none of this project's dependencies
    model_free_ptq = importlib.import_module("llmcompressor").model_free_ptq
    watch = Stopwatch()
    watch.time(
        "convert",
        lambda: model_free_ptq(
            str(model), str(out), scheme="NVFP4A16", ignore=LEFT_OUT, max_workers=1, device="cpu"
        ),
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    packed = sum(name.endswith(".weight_packed") for name in index["weight_map"])
    return watch.to_dict("convert") | {"linears": packed}


def main() -> None:
    """Run what the arguments say and write the result."""
    tool, preset, model, out, work = sys.argv[1:]
    runs = {"nvvl": run_nvvl, "modelopt": run_modelopt, "llm-compressor": run_llm_compressor}
    result = runs[tool](preset, Path(model), Path(out), Path(work))
    (Path(work) / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
