"""Write a random checkpoint of the released layout, at the size that is to be measured.

    python benchmarks/make_checkpoint.py --size tiny|blocks|1b|12b OUT

Nobody needs the released weights to measure time and memory, but the numbers must look like
trained ones, or scales, rounding and overflow are tested on something that does not happen:

* weights are normal with a log-normal scale for each row, a few columns several times larger (the
  input channels where outliers meet), and a few single values far out;
* norms have a few channels far above one, which gives activations the outlier channels that
  language models have; layers that write to the residual stream are smaller, as initialized for
  their depth, so that 62 of them stay finite;
* ``A_log``, ``dt_bias`` and ``D`` span the ranges that Mamba2 is initialized with.

Each tensor is drawn from the seed and its name, in pieces of rows, and written before the next one
is begun: memory is that of the largest tensor. The tokenizer is the embedded model's, with unused
entries up to the ids of the config. Configs lie beside this file; that of ``12b`` has the released
geometry (its README line says what of it is known), and ``blocks`` is one block of each kind of it.
"""

import argparse
import json
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from nvvl.model.checkpoint import CheckpointWriter, TensorSpec
from nvvl.model.config import VLMConfig
from nvvl.model.resolve import resolve_model
from nvvl.model.safetensors_io import torch_dtypes
from nvvl.model.tensor_list import list_tensors

SHARD_BYTES = {"tiny": 1_000_000, "blocks": 5_000_000_000, "1b": 600_000_000, "12b": 5_000_000_000}

_PIECE_ELEMENTS = 1 << 22
_ROW_SPREAD = 0.25  # of the logarithm of a row's scale
_OUTLIER_COLUMNS = 0.002
_OUTLIER_FACTOR = 6.0
_FAR_VALUES = 1e-5
_FAR_FACTOR = 8.0
_LARGE_CHANNELS = 0.003
_LARGE_NORM = 8.0
_RESIDUAL_LEAVES = ("out_proj", "down_proj", "o_proj", "attn.proj", "fc2")


def make_checkpoint(size: str, out: Path, *, seed: int = 0) -> None:
    """Write one folder.

    Args:
        size: ``tiny``, ``blocks``, ``1b`` or ``12b``.
        out: The folder; must not hold a checkpoint yet.
        seed: Of all weights.
    """
    if (out / "config.json").exists():
        raise SystemExit(f"{out}: holds a checkpoint already; give another folder, or remove it")
    text = Path(__file__).with_name(f"config-{size}.json").read_text(encoding="utf-8")
    config = VLMConfig.from_dict(json.loads(text))
    layout = list_tensors(config)
    depth = len(config.language.layers)
    with CheckpointWriter(out, layout, max_shard_bytes=SHARD_BYTES[size]) as writer:
        for spec in layout:
            writer.write(spec.name, draw(spec, config, depth=depth, seed=seed))
        writer.finish()
    files = {
        "preprocessor_config.json": {"image_size": config.image_size},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [12], "pad_token_id": 0},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, values in files.items():
        (out / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    make_tokenizer(config).save(str(out / "tokenizer.json"))
    (out / "config.json").write_text(text, encoding="utf-8")  # last: a folder with it is whole


def draw(spec: TensorSpec, config: VLMConfig, *, depth: int, seed: int) -> Tensor:
    """Draw one tensor in the dtype it is stored in."""
    # torch's CPU generator uses the low 32 bits of a seed only, so the seed is hashed in
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode(), seed))
    leaf = spec.name.rpartition(".")[2]
    special: dict[str, Callable[[], Tensor]] = {
        "A_log": lambda: torch.log(1 + 15 * torch.rand(spec.shape, generator=generator)),
        "dt_bias": lambda: _draw_dt_bias(spec.shape, generator),
        "D": lambda: 1 + 0.1 * torch.randn(spec.shape, generator=generator),
        "bias": lambda: 0.02 * torch.randn(spec.shape, generator=generator),
        "norm_mean": lambda: torch.tensor(config.norm_mean).reshape(spec.shape),
        "norm_std": lambda: torch.tensor(config.norm_std).reshape(spec.shape),
    }
    dtype = torch_dtypes()[spec.dtype]
    if leaf in special:
        return special[leaf]().to(dtype)
    if len(spec.shape) == 1:
        return _draw_norm(spec.shape[0], generator).to(dtype)
    if "embeddings" in spec.name or not spec.name.endswith(".weight"):
        std = 0.5 if "embeddings" in spec.name else 0.02
    else:
        fan_in = math.prod(spec.shape[1:])
        std = 1 / math.sqrt(fan_in)
        if any(part in spec.name for part in _RESIDUAL_LEAVES):
            std /= math.sqrt(2 * depth)
    return _draw_weight(spec.shape, std, dtype, generator)


def _draw_dt_bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw so that time steps lie between 0.001 and 0.1 after softplus."""
    low, high = math.log(0.001), math.log(0.1)
    steps = torch.exp(low + (high - low) * torch.rand(shape, generator=generator))
    return torch.log(torch.expm1(steps))


def _draw_norm(size: int, generator: torch.Generator) -> Tensor:
    weight = 1 + 0.1 * torch.randn(size, generator=generator)
    large = torch.rand(size, generator=generator) < _LARGE_CHANNELS
    return torch.where(large, weight * _LARGE_NORM, weight)


def _draw_weight(
    shape: tuple[int, ...], std: float, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    flat = out.view(-1, shape[-1])
    columns = torch.full((flat.shape[1],), std)
    columns[torch.rand(flat.shape[1], generator=generator) < _OUTLIER_COLUMNS] *= _OUTLIER_FACTOR
    for piece in flat.split(max(1, _PIECE_ELEMENTS // flat.shape[1])):
        values = torch.randn(piece.shape, generator=generator)
        rows = torch.randn((piece.shape[0], 1), generator=generator)
        values *= torch.exp(_ROW_SPREAD * rows) * columns
        count = math.ceil(_FAR_VALUES * piece.numel())
        places = torch.randint(piece.numel(), (count,), generator=generator)
        values.view(-1)[places] *= _FAR_FACTOR
        piece.copy_(values)
    return out


def make_tokenizer(config: VLMConfig) -> Tokenizer:
    """Give the embedded model's tokenizer the vision tokens at the ids of a config."""
    source = json.loads((resolve_model("embedded") / "tokenizer.json").read_text(encoding="utf-8"))
    vision = {config.image_start_token, config.image_token, config.image_end_token}
    vision.add(config.video_token)
    kept = [token for token in source["added_tokens"] if token["content"] not in vision]
    vocab: dict[str, int] = {
        token: index for token, index in source["model"]["vocab"].items() if token not in vision
    }
    # entries that no merge leads to are never produced
    for index in range(len(vocab), config.image_token_id):
        vocab[f"<unused_{index}>"] = index
    values = source | {"added_tokens": kept, "model": source["model"] | {"vocab": vocab}}
    tokenizer = Tokenizer.from_str(json.dumps(values))
    order = [config.image_token, config.image_start_token, config.image_end_token]
    order += ["<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", config.video_token]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in order])
    return tokenizer


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--size", choices=SHARD_BYTES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    make_checkpoint(arguments.size, arguments.out, seed=arguments.seed)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {size:,} bytes in {seconds:.0f} s")


if __name__ == "__main__":
    main()
