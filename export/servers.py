"""What each server makes of this model: limits that no rule covers, and how it is started.

Read from sources and documents of vLLM 0.33, TensorRT-LLM main, SGLang main and Edge-LLM 0.11; of
these, `tools/interop` runs vLLM's CPU build and Edge-LLM's exporter.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from nvvl.export.view import CheckpointView

ServerName = Literal["vllm", "tensorrt-llm", "sglang", "edge-llm"]

# Context that the released model is served with, and the paper's video sampling.
_MAX_CONTEXT = 131072
_VIDEO = {"video": {"fps": 2, "num_frames": 128}}
_PRUNING_RATE = 0.75

# What Edge-LLM 0.11 builds, whatever config.json and the tensors say: ViT-H.
_EDGE_HEAD_WIDTH = 80
_EDGE_LAYERS = 32
_EDGE_CLASS_TOKENS = 10
_CLASS_TOKENS = "vision_model.radio_model.model.patch_generator.cls_token.token"

_HOPPER_NOTE = (
    "before Blackwell (sm100), NVFP4 weights stay packed but inputs are not rounded to FP4: other "
    "numbers than were calibrated, nearer to BF16"
)

# SGLang's --quantization by algorithm.
_SGLANG_METHODS = {
    "FP8": "modelopt_fp8",
    "NVFP4": "modelopt_fp4",
    "W4A16_NVFP4": "modelopt_fp4",
    "MIXED_PRECISION": "modelopt_mixed",
}

# The only vision towers that SGLang builds, by the name in vision_config.args, whatever sizes stand
# beside it: width, layers, heads, width of the MLP.
_SGLANG_TOWERS = {
    "vit_small_patch16_224": (384, 12, 6, 1536),
    "vit_base_patch16_224": (768, 12, 12, 3072),
    "vit_large_patch16_224": (1024, 24, 16, 4096),
    "vit_huge_patch16_224": (1280, 32, 16, 5120),
}
_TOWER_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

# (what of the checkpoint it cannot take, what is good to know)
Findings = tuple[list[str], list[str]]


def _find_vllm(view: CheckpointView) -> Findings:
    obstacles = [] if _has_code(view) else [_no_code("vLLM")]
    notes = [_HOPPER_NOTE] if _algo(view) in ("NVFP4", "MIXED_PRECISION") else []
    return obstacles, notes


def _write_vllm(view: CheckpointView, folder: str) -> list[str]:
    return [
        _join(
            f"vllm serve {folder}",
            "--trust-remote-code" if _has_code(view) else "",
            f"--max-model-len {_context(view)}",
            "--mamba-ssm-cache-dtype float32",
            f"--video-pruning-rate {_PRUNING_RATE}",
            f"--media-io-kwargs {shlex.quote(json.dumps(_VIDEO))}",
        )
    ]


def _find_tensorrt_llm(view: CheckpointView) -> Findings:
    obstacles = [] if _has_code(view) else [_no_code("TensorRT-LLM")]
    notes = ["its PyTorch backend loads the folder as it is; it has no engines of this model"]
    notes.append("chunked prefill fails with video; reuse of cache blocks must be off")
    notes.append("with pruned videos it takes no batch that mixes them with prompts without one")
    if _algo(view) == "W4A16_NVFP4":
        notes.append("weights-only NVFP4 came in 2026: older releases may refuse W4A16_NVFP4")
    if _algo(view) == "MIXED_PRECISION":
        notes.append(
            "mixed formats need a release that strips 'language_model.' from quantized_layers: "
            "older ones find none of them and build every layer in 16 bits"
        )
    if _algo(view) in ("NVFP4", "MIXED_PRECISION"):
        notes.append(_HOPPER_NOTE)
    return obstacles, notes


def _write_tensorrt_llm(view: CheckpointView, folder: str) -> list[str]:
    config = "kv_cache_config: {enable_block_reuse: false, mamba_ssm_cache_dtype: float32}"
    return [
        f"echo {shlex.quote(config)} > trtllm.yml",
        _join(
            f"trtllm-serve {folder}",
            "--backend pytorch",
            "--trust_remote_code" if _has_code(view) else "",
            f"--max_num_tokens {_context(view)}",
            f"--video_pruning_rate {_PRUNING_RATE}",
            f"--media_io_kwargs {shlex.quote(json.dumps(_VIDEO))}",
            "--config trtllm.yml",
        ),
    ]


def _find_sglang(view: CheckpointView) -> Findings:
    obstacles = []
    sizes = (view.config.get("vision_config") or {}).get("args") or {}
    name = sizes.get("model")
    if name not in _SGLANG_TOWERS:
        obstacles.append(f"vision tower {name!r}: it builds {', '.join(_SGLANG_TOWERS)}")
    else:
        built: dict[str, int] = dict(zip(_TOWER_SIZES, _SGLANG_TOWERS[name], strict=True))
        given = {size: sizes[size] for size in _TOWER_SIZES if sizes.get(size) is not None}
        differ = [f"{key} {n} (not {built[key]})" for key, n in given.items() if n != built[key]]
        if differ:
            obstacles.append(
                f"vision tower {name} with {', '.join(differ)}: it goes by the name alone"
            )
    if _algo(view) == "MIXED_PRECISION" and any(
        view.stored(f"{mixer}.{part}") != "bf16"
        for mixer in view.attention_layers
        for part in ("q_proj", "k_proj", "v_proj")
    ):
        obstacles.append(
            "quantized attention in MIXED_PRECISION: it looks for qkv_proj among the layers, finds "
            "none, and takes the codes for 16-bit values; leave q, k and v in BF16"
        )
    notes = []
    if _algo(view) == "W4A16_NVFP4":
        notes.append("weights-only NVFP4 is in 0.5.23: older releases may refuse W4A16_NVFP4")
    return obstacles, notes


def _write_sglang(view: CheckpointView, folder: str) -> list[str]:
    method = _SGLANG_METHODS.get(_algo(view))
    return [
        _join(
            f"python3 -m sglang.launch_server --model-path {folder}",
            "--trust-remote-code" if _has_code(view) else "",
            f"--quantization {method}" if method else "",
            f"--context-length {_context(view)}",
        )
    ]


def _find_edge_llm(view: CheckpointView) -> Findings:
    vision = view.config.get("vision_config") or {}
    sizes = vision.get("args") or {}
    width = view.config.get("vit_hidden_size", 0)
    obstacles = []
    heads = sizes.get("num_attention_heads")
    if heads is not None and width // _EDGE_HEAD_WIDTH != heads:
        obstacles.append(
            f"vision tower of {heads} heads of {width // heads}: it builds heads of "
            f"{_EDGE_HEAD_WIDTH}"
        )
    layers = sizes.get("num_hidden_layers", _EDGE_LAYERS)
    if layers != vision.get("num_hidden_layers", _EDGE_LAYERS):
        obstacles.append(
            f"vision tower of {layers} layers: it reads vision_config.num_hidden_layers, which is "
            f"not there, and builds {_EDGE_LAYERS}"
        )
    header = view.tensors.get(_CLASS_TOKENS)
    if header is not None and header.shape[0] != _EDGE_CLASS_TOKENS:
        obstacles.append(
            f"{header.shape[0]} class and register tokens: it takes {_EDGE_CLASS_TOKENS} away, so "
            "image features would be shifted without a word"
        )
    if not _has_chat_template(view):
        obstacles.append("no chat template: its exporter stops without chat_template.jinja")
    notes = [
        "it builds engines on the machine that serves: Jetson Thor, or an RTX or data center GPU"
    ]
    if _algo(view) == "W4A16_NVFP4":
        notes.append(
            "weights-only NVFP4 by way of ONNX alone: tensorrt-edgellm-serve would round inputs, "
            "with a scale of 1"
        )
    return obstacles, notes


def _write_edge_llm(view: CheckpointView, folder: str) -> list[str]:
    context = min(_context(view), 8192)
    export = f"tensorrt-edgellm-export {folder} edge-llm-onnx --skip-audio"
    if _algo(view) == "W4A16_NVFP4":
        return [f"{export} --no-quantize-activations"]
    return [
        export,
        "# or, on the machine that serves, engines without ONNX:",
        _join(
            f"tensorrt-edgellm-serve {folder}",
            f"--max-input-len {context // 2}",
            f"--max-kv-cache-capacity {context}",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Server:
    """One server.

    Attributes:
        title: Its name, as the rules have it.
        find: Lists what it cannot take, and notes.
        write: Writes the lines for a shell; takes the quoted folder.
    """

    title: str
    find: Callable[[CheckpointView], Findings]
    write: Callable[[CheckpointView, str], list[str]]


SERVERS: Mapping[ServerName, Server] = {
    "vllm": Server(title="vLLM", find=_find_vllm, write=_write_vllm),
    "tensorrt-llm": Server(
        title="TensorRT-LLM", find=_find_tensorrt_llm, write=_write_tensorrt_llm
    ),
    "sglang": Server(title="SGLang", find=_find_sglang, write=_write_sglang),
    "edge-llm": Server(title="Edge-LLM", find=_find_edge_llm, write=_write_edge_llm),
}


def _algo(view: CheckpointView) -> str:
    return "" if view.declaration is None else view.declaration.algo


def _context(view: CheckpointView) -> int:
    longest = view.language_config.get("max_position_embeddings", _MAX_CONTEXT)
    return min(int(longest), _MAX_CONTEXT)


def _has_code(view: CheckpointView) -> bool:
    return bool(view.code_files) and not view.missing_code_files


def _no_code(server: str) -> str:
    return (
        "no configuration class: transformers does not know this model type, and the folder brings "
        f"no code for it, so {server} cannot read config.json until a class is registered"
    )


def _has_chat_template(view: CheckpointView) -> bool:
    assert view.folder is not None
    if (view.folder / "chat_template.jinja").exists():
        return True
    tokenizer = view.folder / "tokenizer_config.json"
    return tokenizer.exists() and '"chat_template"' in tokenizer.read_text(encoding="utf-8")


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
