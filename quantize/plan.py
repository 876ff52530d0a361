"""What a quantization run would do, from config.json and tensor headers alone.

Nothing here imports torch or reads a weight, so a plan of a 12B model takes well under a second.
The size of the output is exact, because the layout, the headers and the JSON files are built as the
run builds them; only ``manifest.json`` is estimated, which also names items and the command.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvvl.model.checkpoint import TensorSpec
from nvvl.model.checkpoint_writer import Shard, files_bytes, plan_shards
from nvvl.model.config import VLMConfig
from nvvl.quantize.amaxes import CALIBRATION_NAME, calibration_tensors
from nvvl.quantize.estimate import Estimate, estimate_run
from nvvl.quantize.formats import BLOCK_SIZE
from nvvl.quantize.layout import linear_tensors, replace_linears
from nvvl.quantize.manifest import Manifest, TensorRecord, encode_json, library_versions
from nvvl.quantize.recipe import CALIBRATED_FORMATS, NVFP4_FORMATS, Format, Recipe, Rule
from nvvl.quantize.side_files import copied_files, json_files
from nvvl.quantize.source import PlannedSource, read_source
from nvvl.quantize.targets import assign_formats, list_linears, match_rule

TENSOR_PARALLEL = (2, 4, 8)
_OTHERS = "norms, conv1d, SSM constants"


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

    source: PlannedSource
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
        if split and formats[fqn] in NVFP4_FORMATS and in_features % (num_gpus * BLOCK_SIZE):
            leaf = fqn.rpartition(".")[2]
            cut[f"{leaf}: {in_features} inputs are no whole blocks of {BLOCK_SIZE}"] += 1
    return (*faults, *(f"{fault} ({count} linears)" for fault, count in cut.items()))


def _estimate_manifest(
    source: PlannedSource,
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
