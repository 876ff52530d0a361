"""Quantizes a checkpoint block by block: read, run, fix scales, pack, write, drop.

    patch generator -> RADIO blocks -> projector -> embeddings -> layers 0..N-1 -> everything else

One block's weights are in memory at a time, whatever the size of the model. The calibration items
travel along as activations (``nvvl.quantize.activations``): each block is run over them once, and
that one run both gives ModelOpt's quantizers their amax and makes the inputs of the next block.
Weight-only recipes need no items and run nothing.

While one block runs, the next one is read (``nvvl.quantize.blocks``) and the one before is packed
and written, so memory holds three blocks, or one where it has to (``Limits``). The output's layout
is known before the first weight is read, so tensors go straight to their place in the output files.
What is not quantized is copied byte for byte in its stored dtype. Weights to be quantized are read
as BF16, the dtype they are calibrated and served in.

A finished block is recorded in a journal, so a run that was killed goes on from there to the same
bytes (``nvvl.quantize.journal``). What the walk writes is not called good here: ``nvvl verify``
reads it back with other code.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nvvl.calib_data.items import Item
from nvvl.errors import CalibrationError, DataError, OutputError
from nvvl.model.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from nvvl.model.load import check_tensors, expected_tensors
from nvvl.model.processor import Processor
from nvvl.quantize import kernels
from nvvl.quantize.activations import Activations
from nvvl.quantize.background import Background
from nvvl.quantize.block_runner import BlockRunner, count_runs
from nvvl.quantize.blocks import (
    EMBEDDINGS,
    BlockReader,
    LoadedBlock,
    finite_pieces,
    list_blocks,
)
from nvvl.quantize.estimate import UNLIMITED, Limits
from nvvl.quantize.freed import return_freed_memory
from nvvl.quantize.journal import BlockRecord, Journal, describe_run
from nvvl.quantize.layout import build_layout
from nvvl.quantize.manifest import Manifest, TensorRecord, hash_files, library_versions
from nvvl.quantize.pack import Amax, pack_linear, require_usable, share_qkv
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe
from nvvl.quantize.side_files import write_side_files
from nvvl.quantize.staging import resumable_folder
from nvvl.quantize.stored import StoredCalibration
from nvvl.quantize.targets import assign_formats, list_linears, quantized_only

if TYPE_CHECKING:
    from nvvl.calib_data.manifest import CalibrationSet

Progress = Callable[[str, int, int], None]

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
    limits: Limits = UNLIMITED,
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
        limits: What of it may be in memory at once; changes no byte of the output.

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
            walk = Walk(
                checkpoint, formats, recipe, layout, writer, device, journal, stored, limits
            )
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
        limits: Limits = UNLIMITED,
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
        self._limits = limits
        self._runner = BlockRunner(checkpoint, device)

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
        num_runs = count_runs(blocks, self._formats) if items else 0
        ticker = _Ticker(progress, total=len(blocks) + 1 + num_runs * len(items))
        finished = list(self._journal.blocks)
        for record in finished:
            self._restore(record)
        activations = None
        num_run = num_runs
        if len(finished) < num_runs:
            activations = self._open_activations(items, ticker)
            num_run = self._catch_up(activations, finished, ticker)
        ticker.skip(len(finished) + num_run * len(items))
        ahead = self._limits.overlap
        left = blocks[len(finished) :]
        with (
            BlockReader(self._checkpoint, left, device=self._device, ahead=ahead) as reader,
            Background(threaded=ahead) as background,
        ):
            for index, name in enumerate(left, start=len(finished)):
                ticker.stage = name
                finish = self._visit(
                    reader.take(name), activations if index < num_runs else None, index
                )
                background.submit(finish)
                del finish  # else the block before stays while the next one runs
                return_freed_memory()
                ticker.tick()
                if stop is not None and stop():
                    background.wait()
                    raise KeyboardInterrupt
        ticker.stage = _REST
        for name in self._checkpoint.tensors:
            if name not in self.source_hashes:
                self._copy_pieces(name)
        ticker.tick()

    def _open_activations(self, items: Sequence[Item], ticker: "_Ticker") -> Activations:
        return Activations(
            items,
            Processor.from_folder(self._checkpoint.folder),
            device=self._device,
            tick=ticker.tick,
            budget_bytes=self._limits.activation_bytes,
        )

    def _restore(self, record: BlockRecord) -> None:
        """Take a finished block from the journal; write again what never reached the disk."""
        self.source_hashes |= record.source
        self.written |= record.written
        self.amaxes |= record.amaxes
        self.items += record.items
        lost = record.written.keys() - self._writer.written
        linears = {fqn for fqn in record.amaxes if any(n.startswith(f"{fqn}.") for n in lost)}
        for fqn in linears:
            self._pack(fqn, record.amaxes[fqn], self._checkpoint.load(f"{fqn}.weight"))
        for name in lost:
            if name.rpartition(".")[0] not in record.amaxes:
                self._copy_pieces(name)

    def _catch_up(
        self, activations: Activations, finished: Sequence[BlockRecord], ticker: "_Ticker"
    ) -> int:
        """Bring the items to where the finished blocks leave them; return how many were skipped."""
        num_run, spill = self._journal.read_spill()
        if spill is not None:
            activations.restore(spill, self.items)
        names = [record.block for record in finished[num_run:]]
        with BlockReader(
            self._checkpoint, names, device=self._device, ahead=self._limits.overlap
        ) as reader:
            for count, name in enumerate(names, start=num_run + 1):
                ticker.stage = name
                block = reader.take(name)
                self._run_over(activations, count, partial(self._runner.run, block, activations))
                self._journal.drop_spills(before=count)
        return num_run

    def _visit(
        self, block: LoadedBlock, activations: Activations | None, index: int
    ) -> Callable[[], None]:
        """Run one block and fix its amax; return what writes it and records it as finished."""
        self._require_calibrated_on(block.sha256)
        spill, drawn = "", []
        amaxes: dict[str, Amax] = {}
        if activations is None:
            amaxes = self._weight_amaxes(block)
        else:
            num_drawn = len(activations.records)

            def run() -> None:
                nonlocal amaxes
                amaxes = self._calibrate(block, activations)

            spill = self._run_over(activations, index + 1, run)
            drawn = activations.records[num_drawn:]
        amaxes = share_qkv(amaxes)
        require_usable(amaxes, self._formats)
        return partial(self._finish, block, amaxes, drawn, spill)

    def _finish(
        self,
        block: LoadedBlock,
        amaxes: Mapping[str, Amax],
        drawn: Sequence[tuple[str, str]],
        spill: str,
    ) -> None:
        """Pack and write a block, and record it as finished."""
        written: dict[str, TensorRecord] = {}
        source = dict(block.sha256)
        for name, tensor in block.host.items():
            fqn = name.removesuffix(".weight")
            if fqn in amaxes:
                written |= self._pack(fqn, amaxes[fqn], block.device[name])
            else:
                written[name] = self._write(name, tensor, sha256=source[name])
        if block.name == EMBEDDINGS:
            name = f"{EMBEDDINGS}.weight"
            written[name] = self._copy_pieces(name)
            source[name] = written[name].sha256
        self.source_hashes |= source
        self.written |= written
        self.amaxes |= amaxes
        self.items += drawn
        self._journal.append(
            BlockRecord(
                block=block.name,
                source=source,
                written=written,
                amaxes=amaxes,
                items=drawn,
                spill=spill,
            )
        )

    def _run_over(self, activations: Activations, count: int, run: Callable[[], None]) -> str:
        """Run a block over the items, and write down what they are after ``count`` blocks."""
        free = shutil.disk_usage(self._journal.folder).free
        room = free - self._writer.bytes_to_come() - _SPARE_BYTES
        return activations.run_block(run, self._journal.spill_path(count), room=room)

    def _calibrate(self, block: LoadedBlock, activations: Activations) -> dict[str, Amax]:
        """Run one block over the items, and find the amax of its quantized linears."""
        formats = self._formats_of(block)
        if not formats:
            self._runner.run(block, activations)
            return {}
        from nvvl.quantize.weighting import calibrate_layer

        layer = self._runner.fill_layer(block)
        amaxes = calibrate_layer(layer, block.name, formats, self._recipe, activations)
        for parameter in layer.parameters():
            # ModelOpt's layers are reference cycles, which live until Python looks for them
            parameter.data = parameter.new_empty(0)
        return amaxes

    def _weight_amaxes(self, block: LoadedBlock) -> dict[str, Amax]:
        """Find the amax of weights alone; those of inputs come from a stored calibration."""
        amaxes: dict[str, Amax] = {}
        for fqn, linear_format in self._formats_of(block).items():
            weight = kernels.amax(block.device[f"{fqn}.weight"].bfloat16()).cpu()
            stored = self._stored if linear_format in CALIBRATED_FORMATS else None
            amaxes[fqn] = Amax(weight, stored.inputs[fqn] if stored else None)
        return amaxes

    def _formats_of(self, block: LoadedBlock) -> dict[str, Format]:
        formats: dict[str, Format] = {}
        for fqn, linear_format in quantized_only(self._formats).items():
            if fqn.startswith(f"{block.name}."):
                formats[fqn] = linear_format
        return formats

    def _pack(self, fqn: str, amax: Amax, weight: Tensor) -> dict[str, TensorRecord]:
        weight = weight.to(device=self._device, dtype=torch.bfloat16)
        tensors = pack_linear(weight, self._formats[fqn], amax)
        return {f"{fqn}.{leaf}": self._write(f"{fqn}.{leaf}", t) for leaf, t in tensors.items()}

    def _require_calibrated_on(self, hashes: Mapping[str, str]) -> None:
        stored = self._stored
        for name, sha256 in hashes.items():
            if stored is not None and stored.source.get(name) != sha256:
                raise CalibrationError(
                    f"{stored.folder}: was calibrated on another source ({name} differs); "
                    "calibrate again, or give the MODEL it was made from"
                )

    def _write(self, name: str, tensor: Tensor, *, sha256: str | None = None) -> TensorRecord:
        spec = self._specs[name]
        if name in self._writer.written:  # one of a linear's tensors was lost, this one was not
            return self.written[name]
        return TensorRecord(self._writer.write(name, tensor, sha256=sha256), spec.dtype, spec.shape)

    def _copy_pieces(self, name: str) -> TensorRecord:
        """Copy a tensor that is not read whole: one hash says what was read and written."""
        info = self._checkpoint.info(name)
        sha256 = self._writer.write_pieces(name, finite_pieces(info))
        self._require_calibrated_on({name: sha256})
        self.source_hashes[name] = sha256
        self.written[name] = TensorRecord(sha256, info.dtype, info.shape)
        return self.written[name]


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
