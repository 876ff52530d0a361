"""Quantizes a checkpoint block by block: read, run, fix scales, pack, write, drop.

    patch generator -> RADIO blocks -> projector -> embeddings -> layers 0..N-1 -> everything else

One block's weights are in memory at a time, whatever the size of the model. The calibration items
travel along as activations (``nvvl.quantize.activations``): each block is run over them once, and
that one run both gives ModelOpt's quantizers their amax and makes the inputs of the next block.
Weight-only recipes need no items and run nothing.

The output's layout is known before the first weight is read, so tensors go straight to their place
in the output files. What is not quantized is copied byte for byte in its stored dtype. Weights to
be quantized are read as BF16, the dtype they are calibrated and served in.

A finished block is recorded in a journal, so a run that was killed goes on from there to the same
bytes (``nvvl.quantize.journal``). What the walk writes is not called good here: ``nvvl verify``
reads it back with other code.
"""

import copy
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nvvl.calib_data.items import Item
from nvvl.errors import CalibrationError, CheckpointError, DataError, OutputError
from nvvl.model.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from nvvl.model.config import VLMConfig
from nvvl.model.load import check_tensors, expected_tensors, materialize
from nvvl.model.processor import Processor
from nvvl.model.safetensors_io import tensor_bytes
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize import kernels
from nvvl.quantize.activations import Activations
from nvvl.quantize.journal import BlockRecord, Journal, describe_run
from nvvl.quantize.layout import build_layout
from nvvl.quantize.manifest import Manifest, TensorRecord, hash_files, library_versions
from nvvl.quantize.pack import Amax, pack_linear, require_usable, share_qkv
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe
from nvvl.quantize.side_files import write_side_files
from nvvl.quantize.staging import resumable_folder
from nvvl.quantize.stored import StoredCalibration
from nvvl.quantize.targets import LAYERS, assign_formats, layer_index, list_linears, quantized_only

if TYPE_CHECKING:
    from nvvl.calib_data.manifest import CalibrationSet

Progress = Callable[[str, int, int], None]

_PATCHES = "vision_model.radio_model.model.patch_generator"
_VISION_BLOCKS = "vision_model.radio_model.model.blocks"
_PROJECTOR = "mlp1"
_EMBEDDINGS = "language_model.backbone.embeddings"
_REST = "everything else"

# Left free beside the output: side files, and whatever else the user does meanwhile.
_SPARE_BYTES = 256 * 2**20


def quantize_checkpoint(
    source: Path,
    out: Path,
    recipe: Recipe,
    items: "CalibrationSet | None",
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    command: Sequence[str] = (),
    from_calibration: Path | None = None,
) -> Manifest:
    """Write a quantized copy of a BF16 checkpoint, or go on where a killed run stopped.

    Args:
        source: A BF16 checkpoint folder in the released layout.
        out: The folder to make.
        recipe: Which linears get which format.
        items: The calibration set; not read by recipes that quantize weights alone.
        device: Where blocks are run, calibrated and packed.
        overwrite: Replace an ``out`` that an earlier run wrote, and drop an unfinished run that
            was made from something else.
        progress: Called with the name of the block, steps done and steps in total.
        stop: Asked after each block; the walk is interrupted if it says True.
        command: The command line, for the manifest.
        from_calibration: The output of a finished run over the same source, whose amax of inputs
            are used in place of ``items``.

    Returns:
        What was written, as in ``manifest.json``.

    Raises:
        ConfigError: if config.json or the tokenizer cannot be used.
        CheckpointError: if source tensors are missing, unexpected, misshapen or not finite.
        RecipeError: if the recipe does not fit the model.
        DataError: if items are needed and there are none, or one cannot be used.
        CalibrationError: if a linear gets no usable amax, or an item gives NaN or Inf.
        OutputError: if ``out`` exists, the disk is full, or an unfinished run of another recipe,
            source or calibration set is there.
        KeyboardInterrupt: if ``stop`` said True.
    """
    checkpoint = Checkpoint(source)
    check_tensors(checkpoint, expected_tensors(checkpoint.config))
    formats = assign_formats(recipe, list_linears(checkpoint.config))
    stored = None
    if from_calibration is not None:
        stored = StoredCalibration.read(from_calibration)
        stored.require_covers(recipe, formats)
        recipe = replace(recipe, num_calibration_items=stored.recipe.num_calibration_items)
    used_items = () if stored else _select_items(recipe, formats, items)
    layout = build_layout(checkpoint, formats)
    device = torch.device(device)
    identity = describe_run(
        checkpoint, recipe, device=device.type, calibration=stored.sha256 if stored else ""
    )
    with (
        resumable_folder(out, source=source, overwrite=overwrite) as stage,
        Journal(stage, identity, used_items, overwrite=overwrite) as journal,
    ):
        with CheckpointWriter(stage.output, layout, resume=journal.digests) as writer:
            walk = Walk(checkpoint, formats, recipe, layout, writer, device, journal, stored)
            try:
                walk.run(used_items, progress=progress, stop=stop)
            except OutputError as error:
                raise OutputError(
                    f"{error} (the output still needs {writer.bytes_to_come()} bytes; "
                    f"{len(journal.blocks)} finished blocks are kept in {stage.root})"
                ) from error
            writer.finish()
        write_side_files(stage.output, checkpoint, recipe, formats, walk.amaxes)
        manifest = Manifest(
            format=recipe.name,
            command=tuple(command),
            source=walk.source_hashes,
            tensors=walk.written,
            files=hash_files(stage.output),
            items=stored.items if stored else walk.items,
            versions=library_versions(),
        )
        manifest.write(stage.output)
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
        journal: Journal,
        stored: StoredCalibration | None = None,
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
        self._journal = journal
        self._stored = stored
        with torch.device("meta"):
            self._model = NemotronNanoVL(checkpoint.config).eval()

    @torch.no_grad()
    def run(
        self,
        items: Sequence[Item],
        *,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Visit every block: run it over the items where that is needed, and write its tensors.

        Args:
            items: The calibration items; empty if no input is calibrated.
            progress: As in `quantize_checkpoint`.
            stop: As in `quantize_checkpoint`.
        """
        blocks = list_blocks(self._checkpoint.config)
        num_runs = self._num_runs(blocks) if items else 0
        ticker = _Ticker(progress, total=len(blocks) + 1 + num_runs * len(items))
        finished = list(self._journal.blocks)
        for record in finished:
            self._restore(record)
        activations = None
        if len(finished) < num_runs:
            processor = Processor.from_folder(self._checkpoint.folder)
            activations = Activations(items, processor, device=self._device, tick=ticker.tick)
            num_run = self._catch_up(activations, finished, ticker)
        else:
            num_run = num_runs
        ticker.skip(len(finished) + num_run * len(items))
        for index in range(len(finished), len(blocks)):
            ticker.stage = blocks[index]
            self._visit(blocks[index], activations if index < num_runs else None)
            ticker.tick()
            if stop is not None and stop():
                raise KeyboardInterrupt
        ticker.stage = _REST
        self._copy([name for name in self._checkpoint.tensors if name not in self.source_hashes])
        ticker.tick()

    def _restore(self, record: BlockRecord) -> None:
        """Take a finished block from the journal; write again what never reached the disk."""
        self.source_hashes |= record.source
        self.written |= record.written
        self.amaxes |= record.amaxes
        self.items += record.items
        lost = record.written.keys() - self._writer.written
        linears = {fqn for fqn in record.amaxes if any(n.startswith(f"{fqn}.") for n in lost)}
        for fqn in linears:
            self._pack(fqn, record.amaxes[fqn])
        self._copy(name for name in lost if name.rpartition(".")[0] not in record.amaxes)

    def _catch_up(
        self, activations: Activations, finished: Sequence[BlockRecord], ticker: "_Ticker"
    ) -> int:
        """Bring the items to where the finished blocks leave them; return how many were skipped."""
        num_run, tensors = self._journal.read_spill()
        if num_run:
            activations.restore(tensors, self.items)
        for record in finished[num_run:]:
            ticker.stage = record.block
            if record.block.startswith(LAYERS):
                activations.run_layer(self._load_layer(record.block), record.block)
            else:
                self._run_before_layers(record.block, activations)
        return num_run

    def _num_runs(self, blocks: Sequence[str]) -> int:
        """Count the blocks up to the last one whose inputs are quantized."""
        last = max(
            layer_index(fqn) for fqn, fmt in self._formats.items() if fmt in CALIBRATED_FORMATS
        )
        return blocks.index(f"{LAYERS}.{last}") + 1

    def _visit(self, name: str, activations: Activations | None) -> None:
        num_hashed, num_written = len(self.source_hashes), len(self.written)
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
        drawn = activations.records if activations is not None and not self.items else []
        self.items += drawn
        record = BlockRecord(
            block=name,
            source=dict(islice(self.source_hashes.items(), num_hashed, None)),
            written=dict(islice(self.written.items(), num_written, None)),
            amaxes=amaxes,
            items=drawn,
            spill=self._spill(activations),
        )
        self._journal.append(record)

    def _spill(self, activations: Activations | None) -> str:
        """Write the items down where they leave room for the rest of the output."""
        if activations is None:
            return ""
        free = shutil.disk_usage(self._journal.folder).free
        if free < self._writer.bytes_to_come() + activations.size_bytes + _SPARE_BYTES:
            return ""
        return self._journal.spill(activations.to_tensors())

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
            for fqn, linear_format in formats.items():
                weight = kernels.amax(self._load_weight(fqn)).cpu()
                stored = self._stored if linear_format in CALIBRATED_FORMATS else None
                amaxes[fqn] = Amax(weight, stored.inputs[fqn] if stored else None)
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
            self._require_calibrated_on(name)
        if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            file = self._checkpoint.info(name).file
            raise CheckpointError(f"{file}: {name}: holds NaN or Inf; download it again")
        return tensor

    def _require_calibrated_on(self, name: str) -> None:
        stored = self._stored
        if stored is not None and stored.source.get(name) != self.source_hashes[name]:
            raise CalibrationError(
                f"{stored.folder}: was calibrated on another source ({name} differs); calibrate "
                "again, or give the MODEL it was made from"
            )

    def _write(self, name: str, tensor: Tensor) -> None:
        if name in self._writer.written:
            return  # one of a linear's tensors was lost, this one was not
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

    def skip(self, num_steps: int) -> None:
        """Count steps that an earlier run did."""
        self._done += num_steps

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
