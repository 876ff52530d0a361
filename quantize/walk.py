"""Quantizes a checkpoint block by block: read, run, fix scales, pack, write, drop.

    patch generator -> RADIO blocks -> projector -> embeddings -> layers 0..N-1 -> everything else

One block's weights are in memory at a time, whatever the size of the model. The calibration items
travel along as activations (``nvvl.quantize.activations``): each block is run over them once, and
that one run both gives ModelOpt's quantizers their amax and makes the inputs of the next block.
Weight-only recipes need no items and run nothing.

The output's layout is known before the first weight is read, so tensors go straight to their place
in the output files. What is not quantized is copied byte for byte in its stored dtype. Weights to
be quantized are read as BF16, the dtype they are calibrated and served in.

What the walk writes is not called good here: ``nvvl verify`` reads it back with other code.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nvvl.calib_data.items import Item
from nvvl.errors import CheckpointError, DataError
from nvvl.model.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from nvvl.model.config import VLMConfig
from nvvl.model.load import check_tensors, expected_tensors, materialize
from nvvl.model.processor import Processor
from nvvl.model.safetensors_io import tensor_bytes
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize import kernels
from nvvl.quantize.activations import Activations
from nvvl.quantize.layout import build_layout
from nvvl.quantize.manifest import Manifest, TensorRecord, hash_files, library_versions
from nvvl.quantize.pack import Amax, pack_linear, require_usable, share_qkv
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe
from nvvl.quantize.side_files import write_side_files
from nvvl.quantize.staging import staged_folder
from nvvl.quantize.targets import LAYERS, assign_formats, layer_index, list_linears, quantized_only

if TYPE_CHECKING:
    from nvvl.calib_data.manifest import CalibrationSet

Progress = Callable[[str, int, int], None]

_PATCHES = "vision_model.radio_model.model.patch_generator"
_VISION_BLOCKS = "vision_model.radio_model.model.blocks"
_PROJECTOR = "mlp1"
_EMBEDDINGS = "language_model.backbone.embeddings"
_REST = "everything else"


def quantize_checkpoint(
    source: Path,
    out: Path,
    recipe: Recipe,
    items: "CalibrationSet | None",
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> Manifest:
    """Write a quantized copy of a BF16 checkpoint.

    Args:
        source: A BF16 checkpoint folder in the released layout.
        out: The folder to make.
        recipe: Which linears get which format.
        items: The calibration set; not read by recipes that quantize weights alone.
        device: Where blocks are run, calibrated and packed.
        overwrite: Replace an ``out`` that an earlier run wrote.
        progress: Called with the name of the block, steps done and steps in total.
        command: The command line, for the manifest.

    Returns:
        What was written, as in ``manifest.json``.

    Raises:
        ConfigError: if config.json or the tokenizer cannot be used.
        CheckpointError: if source tensors are missing, unexpected, misshapen or not finite.
        RecipeError: if the recipe does not fit the model.
        DataError: if items are needed and there are none, or one cannot be used.
        CalibrationError: if a linear gets no usable amax, or an item gives NaN or Inf.
        OutputError: if ``out`` exists, or the disk is full.
    """
    checkpoint = Checkpoint(source)
    check_tensors(checkpoint, expected_tensors(checkpoint.config))
    formats = assign_formats(recipe, list_linears(checkpoint.config))
    used_items = _select_items(recipe, formats, items)
    layout = build_layout(checkpoint, formats)
    with staged_folder(out, source=source, overwrite=overwrite) as folder:
        with CheckpointWriter(folder, layout) as writer:
            walk = Walk(checkpoint, formats, recipe, layout, writer, torch.device(device))
            walk.run(used_items, progress=progress)
            writer.finish()
        write_side_files(folder, checkpoint, recipe, formats, walk.amaxes)
        manifest = Manifest(
            format=recipe.name,
            command=tuple(command),
            source=walk.source_hashes,
            tensors=walk.written,
            files=hash_files(folder),
            items=walk.items,
            versions=library_versions(),
        )
        manifest.write(folder)
    return manifest


class Walk:
    """One pass over a checkpoint.

    Attributes:
        amaxes: Of every quantized linear visited so far.
        source_hashes: SHA-256 of every source tensor visited so far.
        written: Every tensor written so far.
        items: (id, SHA-256) of the calibration items that were run.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Mapping[str, Format],
        recipe: Recipe,
        layout: Sequence[TensorSpec],
        writer: CheckpointWriter,
        device: torch.device,
    ) -> None:
        self.amaxes: dict[str, Amax] = {}
        self.source_hashes: dict[str, str] = {}
        self.written: dict[str, TensorRecord] = {}
        self.items: list[tuple[str, str]] = []
        self._checkpoint = checkpoint
        self._formats = formats
        self._recipe = recipe
        self._specs = {spec.name: spec for spec in layout}
        self._writer = writer
        self._device = device
        with torch.device("meta"):
            self._model = NemotronNanoVL(checkpoint.config).eval()

    @torch.no_grad()
    def run(self, items: Sequence[Item], *, progress: Progress | None = None) -> None:
        """Visit every block: run it over the items where that is needed, and write its tensors.

        Args:
            items: The calibration items; empty if no input is quantized.
            progress: As in `quantize_checkpoint`.
        """
        blocks = list_blocks(self._checkpoint.config)
        num_runs = self._num_runs(blocks) if items else 0
        ticker = _Ticker(progress, total=len(blocks) + 1 + num_runs * len(items))
        activations = None
        if items:
            processor = Processor.from_folder(self._checkpoint.folder)
            activations = Activations(items, processor, device=self._device, tick=ticker.tick)
        for index, name in enumerate(blocks):
            ticker.stage = name
            self._visit(name, activations if index < num_runs else None)
            ticker.tick()
        if activations is not None:
            self.items = activations.records
        ticker.stage = _REST
        self._copy([name for name in self._checkpoint.tensors if name not in self.source_hashes])
        ticker.tick()

    def _num_runs(self, blocks: Sequence[str]) -> int:
        """Count the blocks up to the last one whose inputs are quantized."""
        last = max(
            layer_index(fqn) for fqn, fmt in self._formats.items() if fmt in CALIBRATED_FORMATS
        )
        return blocks.index(f"{LAYERS}.{last}") + 1

    def _visit(self, name: str, activations: Activations | None) -> None:
        amaxes: dict[str, Amax] = {}
        if name.startswith(LAYERS):
            amaxes = self._visit_layer(name, activations)
        elif activations is not None:
            self._run_before_layers(name, activations)
        quantized = {f"{fqn}.weight" for fqn in amaxes}
        self._copy(
            tensor
            for tensor in self._checkpoint.tensors
            if tensor.startswith(f"{name}.") and tensor not in quantized
        )
        for fqn, amax in amaxes.items():
            self._pack(fqn, amax)
        self.amaxes |= amaxes

    def _run_before_layers(self, name: str, activations: Activations) -> None:
        with self._weights_of(name) as module:
            if name == _PATCHES:
                activations.cut_patches(module, name)
            elif name == _PROJECTOR:
                activations.project(self._model, name)
            elif name == _EMBEDDINGS:
                activations.embed(self._model, name)
            else:
                activations.encode(module, name)

    def _visit_layer(self, name: str, activations: Activations | None) -> dict[str, Amax]:
        """Run one layer of the language model over the items, and fix its amax."""
        formats: dict[str, Format] = {}
        for fqn, linear_format in quantized_only(self._formats).items():
            if fqn.startswith(f"{name}."):
                formats[fqn] = linear_format
        amaxes: dict[str, Amax] = {}
        if activations is None:
            amaxes = {fqn: Amax(kernels.amax(self._load_weight(fqn)).cpu()) for fqn in formats}
        elif not formats:
            activations.run_layer(self._load_layer(name), name)
        else:
            from nvvl.quantize.calibrate import calibrate_block

            amaxes = calibrate_block(
                self._load_layer(name),
                name,
                formats,
                algorithm=self._recipe.algorithm,
                forward_loop=lambda layer: activations.run_layer(layer, name),
            )
        amaxes = share_qkv(amaxes)
        require_usable(amaxes, formats)
        return amaxes

    def _load_layer(self, name: str) -> nn.Module:
        # a copy, because quantizers replace its linears; it is dropped with its weights
        layer = copy.deepcopy(self._model.get_submodule(name))
        materialize(layer, name, self._checkpoint, dtype=torch.bfloat16, device=self._device)
        return layer

    @contextmanager
    def _weights_of(self, name: str) -> Iterator[nn.Module]:
        """Give one module of the meta model its weights for a while."""
        module = self._model.get_submodule(name)
        materialize(module, name, self._checkpoint, dtype=torch.bfloat16, device=self._device)
        yield module
        module.to("meta")

    def _copy(self, names: Iterable[str]) -> None:
        for name in names:
            self._write(name, self._load(name))

    def _pack(self, fqn: str, amax: Amax) -> None:
        for leaf, tensor in pack_linear(self._load_weight(fqn), self._formats[fqn], amax).items():
            self._write(f"{fqn}.{leaf}", tensor)

    def _load_weight(self, fqn: str) -> Tensor:
        return self._load(f"{fqn}.weight").to(device=self._device, dtype=torch.bfloat16)

    def _load(self, name: str) -> Tensor:
        """Read a source tensor, hash it once, and refuse NaN and Inf."""
        tensor = self._checkpoint.load(name)
        if name not in self.source_hashes:
            self.source_hashes[name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            file = self._checkpoint.info(name).file
            raise CheckpointError(f"{file}: {name}: holds NaN or Inf; download it again")
        return tensor

    def _write(self, name: str, tensor: Tensor) -> None:
        spec = self._specs[name]
        sha256 = self._writer.write(name, tensor)
        self.written[name] = TensorRecord(sha256, spec.dtype, spec.shape)


def list_blocks(config: VLMConfig) -> list[str]:
    """Return the modules that are read and run one at a time, in the order of the forward."""
    return [
        _PATCHES,
        *(f"{_VISION_BLOCKS}.{index}" for index in range(config.vision.num_layers)),
        _PROJECTOR,
        _EMBEDDINGS,
        *(f"{LAYERS}.{index}" for index in range(len(config.language.layers))),
    ]


class _Ticker:
    """Counts steps for a progress callback."""

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        self.stage = ""
        self._progress = progress
        self._total = total
        self._done = 0

    def tick(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self.stage, self._done, self._total)


def _select_items(
    recipe: Recipe, formats: Mapping[str, Format], items: "CalibrationSet | None"
) -> Sequence[Item]:
    """Return the items to calibrate with; none if only weights are quantized."""
    if not set(CALIBRATED_FORMATS) & set(formats.values()):
        return ()
    if items is None or not items.items:
        raise DataError(
            f"recipe {recipe.name} quantizes inputs too, and there are no calibration items; "
            "give a calibration set with at least one"
        )
    return items.items
