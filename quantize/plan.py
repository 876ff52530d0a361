"""What a quantization run would do, from config.json and tensor headers alone.

Nothing here imports torch or reads a weight, so a plan of a 12B model takes well under a second.
The size of the output is exact, because the layout, the headers and the JSON files are built as the
run builds them; only ``manifest.json`` is estimated, which also names items and the command.

Where a folder has config.json but no shards, shapes come from the config, and dtypes are those that
this family usually has; the plan then says so.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvvl.errors import CheckpointError
from nvvl.model.checkpoint import Checkpoint, TensorSpec
from nvvl.model.checkpoint_writer import INDEX_NAME, Shard, files_bytes, plan_shards
from nvvl.model.config import VLMConfig
from nvvl.model.tensor_list import list_tensors
from nvvl.quantize.estimate import Estimate, estimate_run
from nvvl.quantize.formats import BLOCK_SIZE
from nvvl.quantize.layout import (
    CALIBRATION_NAME,
    calibration_tensors,
    linear_tensors,
    replace_linears,
)
from nvvl.quantize.manifest import Manifest, TensorRecord, encode_json, library_versions
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe, Rule
from nvvl.quantize.side_files import copied_files, json_files
from nvvl.quantize.targets import assign_formats, list_linears, match_rule

TENSOR_PARALLEL = (2, 4, 8)
_SUMMARY_IDXS = "vision_model.radio_model.summary_idxs"
_OTHERS = "norms, conv1d, SSM constants"
_MAX_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class Source:
    """The BF16 checkpoint as far as it is known.

    Attributes:
        tensors: In file order.
        notes: What had to be assumed; empty where headers say everything.
    """

    config: VLMConfig
    tensors: Sequence[TensorSpec]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors of one kind that get one scheme; bytes before and after."""

    name: str
    scheme: Format
    num_tensors: int
    parameters: int
    source_bytes: int
    output_bytes: int


@dataclass(frozen=True, kw_only=True)
class RuleMatch:
    """What one rule of the recipe does: linears it matches, and those that it decides."""

    rule: Rule
    num_matched: int
    num_decided: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would be done.

    Attributes:
        files: Exact bytes of every file of the output that is not a weight, by name.
        manifest_bytes: About what ``manifest.json`` takes, which is not in ``files``.
        shards: The weight files.
        weight_bytes: Exact bytes of the weight files and their index.
        disk_bytes: What the run takes at most: output and spilled activations.
        free_bytes: Of the disk that the current folder is on.
        tensor_parallel: Faults by number of GPUs; none means that every layer can be split.
        json_files: Content of the JSON files of the output.
    """

    source: Source
    recipe: Recipe
    formats: Mapping[str, Format]
    groups: Sequence[Group]
    rules: Sequence[RuleMatch]
    files: Mapping[str, int]
    manifest_bytes: int
    shards: Sequence[Shard]
    weight_bytes: int
    estimate: Estimate
    disk_bytes: int
    free_bytes: int
    tensor_parallel: Mapping[int, Sequence[str]]
    json_files: Mapping[str, Mapping[str, Any]]

    @property
    def output_bytes(self) -> int:
        """Exact bytes of the output but for ``manifest.json``."""
        return self.weight_bytes + sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "recipe": self.recipe.to_dict(),
            "groups": [asdict(group) for group in self.groups],
            "rules": [
                {**asdict(m.rule), "num_matched": m.num_matched, "num_decided": m.num_decided}
                for m in self.rules
            ],
            "source_bytes": sum(spec.nbytes for spec in self.source.tensors),
            "weight_bytes": self.weight_bytes,
            "files": dict(self.files),
            "manifest_bytes": self.manifest_bytes,
            "output_bytes": self.output_bytes,
            "exact": not self.source.notes,
            "notes": list(self.source.notes),
            "estimate": asdict(self.estimate),
            "disk_bytes": self.disk_bytes,
            "free_bytes": self.free_bytes,
            "tensor_parallel": {str(n): list(f) for n, f in self.tensor_parallel.items()},
        }


def make_plan(folder: Path, recipe: Recipe, *, device: str = "cpu", calibrate: bool = True) -> Plan:
    """Plan the quantization of a checkpoint.

    Args:
        folder: A BF16 checkpoint in the released layout, or its config.json, with or without the
            shard index.
        recipe: Which linears get which format.
        device: ``cpu`` or ``cuda``; for the estimate of time.
        calibrate: Whether items are run; not where a stored calibration is packed from.

    Raises:
        ConfigError: if config.json cannot be used.
        CheckpointError: if tensors do not fit config.json, or the folder is quantized.
        RecipeError: if the recipe does not fit the model.
    """
    source = read_source(Path(folder))
    linears = list_linears(source.config)
    formats = assign_formats(recipe, linears)
    layout = replace_linears(source.tensors, formats)
    shards = plan_shards(layout)
    weight_bytes = files_bytes(shards)
    documents = json_files(source.config, recipe, formats)
    files = {path.name: path.stat().st_size for path in copied_files(Path(folder))}
    files |= {name: len(encode_json(values)) for name, values in documents.items()}
    scalars = calibration_tensors(formats)
    files[CALIBRATION_NAME] = plan_shards(scalars)[0].file_bytes
    estimate = estimate_run(
        source.config,
        source.tensors,
        formats,
        num_items=recipe.num_calibration_items if calibrate else 0,
        device=device,
        weighted=calibrate and recipe.image_weight is not None,
    )
    manifest_bytes = _estimate_manifest(source, layout, files, recipe, formats)
    disk_bytes = weight_bytes + sum(files.values()) + manifest_bytes
    return Plan(
        source=source,
        recipe=recipe,
        formats=formats,
        groups=_group(source.tensors, formats),
        rules=_match_rules(recipe, linears, len(source.config.language.layers)),
        files=dict(sorted(files.items())),
        manifest_bytes=manifest_bytes,
        shards=shards,
        weight_bytes=weight_bytes,
        estimate=estimate,
        # a new spill is whole before the one before it is dropped
        disk_bytes=disk_bytes + 2 * estimate.activation_bytes,
        free_bytes=shutil.disk_usage(Path.cwd()).free,
        tensor_parallel={n: _splitting_faults(source.config, formats, n) for n in TENSOR_PARALLEL},
        json_files=documents,
    )


def read_source(folder: Path) -> Source:
    """Read config.json and, as far as there are any, index and headers.

    Raises:
        ConfigError: if config.json cannot be used.
        CheckpointError: if tensors do not fit config.json, or the folder is quantized.
    """
    config = VLMConfig.from_folder(folder)
    if "quantization_config" in config.raw:
        raise CheckpointError(
            f"{folder}: config.json has a quantization_config; required the BF16 checkpoint that "
            "it was made from"
        )
    absent = _absent_shards(folder)
    if list(folder.glob("model*.safetensors")) and not absent:
        checkpoint = Checkpoint(folder)
        expected = {spec.name: spec.shape for spec in list_tensors(checkpoint.config)}
        found = {name: info.shape for name, info in checkpoint.tensors.items()}
        _require_equal(folder, found, expected)
        order = sorted(checkpoint.tensors.values(), key=lambda i: (i.file.name, i.start))
        tensors = [TensorSpec(info.name, info.dtype, info.shape) for info in order]
        return Source(config=checkpoint.config, tensors=tensors)
    return _assume_source(folder, config, absent)


def _absent_shards(folder: Path) -> list[str]:
    """List the shards that an index names and that are not here, as in a download's middle."""
    try:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        return sorted(
            name for name in set(index["weight_map"].values()) if not (folder / name).exists()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # what is wrong with the index is said by who reads the tensors


def _assume_source(folder: Path, config: VLMConfig, absent: Sequence[str]) -> Source:
    """List the tensors that config.json implies; compare them with the index if there is one."""
    which = (
        f"{len(absent)} of the shards are not here, the first {absent[0]}"
        if absent
        else "no shards here"
    )
    notes = [f"{which}: shapes from config.json, dtypes assumed, size not exact"]
    path = folder / INDEX_NAME
    if not path.exists():
        return Source(config=config, tensors=list_tensors(config), notes=tuple(notes))
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names, total = set(index["weight_map"]), index.get("metadata", {}).get("total_size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a shard index ({error!r})") from None
    tensors = list_tensors(config)
    if _SUMMARY_IDXS in names:
        tensors.append(TensorSpec(_SUMMARY_IDXS, "I64", (1,)))
        notes.append(f"{_SUMMARY_IDXS}: length assumed to be 1")
    _require_equal(folder, dict.fromkeys(names, ()), {spec.name: () for spec in tensors})
    tensors.sort(key=lambda spec: index["weight_map"][spec.name])
    size = sum(spec.nbytes for spec in tensors)
    if total is not None and total != size:
        notes.append(f"{INDEX_NAME} says {total} bytes, these shapes and dtypes give {size}")
    return Source(config=config, tensors=tensors, notes=tuple(notes))


def _require_equal(
    folder: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"{name} has shape {found[name]}, required {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if faults:
        raise CheckpointError(
            f"{folder}: {len(faults)} tensors do not fit config.json: {'; '.join(faults)}; "
            "download it again"
        )


def _group(tensors: Sequence[TensorSpec], formats: Mapping[str, Format]) -> list[Group]:
    rows: dict[tuple[str, Format], list[tuple[TensorSpec, int]]] = {}
    for spec in tensors:
        scheme = formats.get(spec.name.removesuffix(".weight"), "bf16")
        size = spec.nbytes
        if scheme != "bf16":
            fqn, (out_features, in_features) = spec.name.removesuffix(".weight"), spec.shape
            shape = (out_features, in_features)
            size = sum(part.nbytes for part in linear_tensors(fqn, shape, scheme))
        rows.setdefault((_group_name(spec.name), scheme), []).append((spec, size))
    return [
        Group(
            name=name,
            scheme=scheme,
            num_tensors=len(members),
            parameters=sum(spec.numel for spec, _ in members),
            source_bytes=sum(spec.nbytes for spec, _ in members),
            output_bytes=sum(size for _, size in members),
        )
        for (name, scheme), members in sorted(rows.items())
    ]


def _group_name(name: str) -> str:
    for prefix, group in (
        ("vision_model.", "vision tower"),
        ("mlp1.", "projector"),
        ("language_model.backbone.embeddings.", "embeddings"),
        ("language_model.lm_head.", "lm_head"),
    ):
        if name.startswith(prefix):
            return group
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return f"layers: {leaf}" if leaf.endswith("_proj") else f"layers: {_OTHERS}"


def _match_rules(
    recipe: Recipe, linears: Mapping[str, tuple[int, int]], num_layers: int
) -> list[RuleMatch]:
    left = set(linears)
    matches = []
    for rule in recipe.rules:
        matched = match_rule(rule, linears, num_layers)
        decided = left & set(matched)
        left -= decided
        matches.append(RuleMatch(rule=rule, num_matched=len(matched), num_decided=len(decided)))
    return matches


def _splitting_faults(
    config: VLMConfig, formats: Mapping[str, Format], num_gpus: int
) -> tuple[str, ...]:
    """List what cannot be split over GPUs: heads, groups, and whole blocks of a split input."""
    language = config.language
    counts = {
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_key_value_heads,
        "mamba_num_heads": language.mamba_num_heads,
        "n_groups": language.n_groups,
        "intermediate_size": language.intermediate_size,
    }
    faults = [
        f"{key} {n} is not a multiple of {num_gpus}" for key, n in counts.items() if n % num_gpus
    ]
    cut: Counter[str] = Counter()
    for fqn, (_, in_features) in list_linears(config).items():
        # these take their input in parts; the others give their output in parts
        split = fqn.endswith(("out_proj", "down_proj", "o_proj"))
        if (
            split
            and formats[fqn] in ("nvfp4", "nvfp4-w4a16")
            and in_features % (num_gpus * BLOCK_SIZE)
        ):
            leaf = fqn.rpartition(".")[2]
            cut[f"{leaf}: {in_features} inputs are no whole blocks of {BLOCK_SIZE}"] += 1
    return (*faults, *(f"{fault} ({count} linears)" for fault, count in cut.items()))


def _estimate_manifest(
    source: Source,
    layout: Sequence[TensorSpec],
    files: Mapping[str, int],
    recipe: Recipe,
    formats: Mapping[str, Format],
) -> int:
    digest = "0" * 64
    calibrated = set(CALIBRATED_FORMATS) & set(formats.values())
    num_items = recipe.num_calibration_items if calibrated else 0
    manifest = Manifest(
        format=recipe.name,
        command=("nvvl", "quantize", recipe.name, "MODEL", "OUT"),
        source={spec.name: digest for spec in source.tensors},
        tensors={spec.name: TensorRecord(digest, spec.dtype, spec.shape) for spec in layout},
        files=dict.fromkeys(files, digest),
        items=[("generated/000000", digest)] * num_items,
        versions=library_versions(),
    )
    return len(encode_json(manifest.to_dict()))
