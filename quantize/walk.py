"""Quantizes a checkpoint block by block: read, run, fix scales, pack, write, drop.

    patch generator -> RADIO blocks -> projector -> embeddings -> layers 0..N-1 -> everything else

One block runs at a time, whatever the size of the model. The calibration items
travel along as activations (``nvvl.quantize.activations``): each block is run over them once, and
that one run both gives ModelOpt's quantizers their amax and makes the inputs of the next block.
Weight-only recipes need no items and run nothing.

While one block runs, the next one is read (``nvvl.quantize.blocks``) and the one before is packed
and written, so memory holds three blocks, or one where it has to (``Limits``). The output's layout
is known before the first weight is read, so tensors go straight to their place in the output files.
Weights to be quantized are read as BF16, the dtype they are calibrated and served in.

A finished block is recorded in a journal, so a run that was killed goes on from there to the same
bytes (``nvvl.quantize.journal``, ``nvvl.quantize.output``).

Several processes walk together (``nvvl.quantize.sharing``): each reads every block and runs it over
its share of the items, the largest amax of all is everybody's, and the main process packs and
writes. The bytes are those of one process.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nvvl.calib_data.items import Item
from nvvl.errors import OutputError, ReportedError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.processes import Processes
from nvvl.model.processor import Processor
from nvvl.progress import Progress, Ticker
from nvvl.quantize import kernels
from nvvl.quantize.activations import Activations
from nvvl.quantize.amaxes import Amax, share_qkv
from nvvl.quantize.background import Background
from nvvl.quantize.block_names import list_blocks
from nvvl.quantize.block_runner import BlockRunner, count_runs
from nvvl.quantize.blocks import BlockReader, LoadedBlock
from nvvl.quantize.freed import return_freed_memory
from nvvl.quantize.journal import BlockRecord, read_journal
from nvvl.quantize.limits import UNLIMITED, Limits
from nvvl.quantize.manifest import Manifest
from nvvl.quantize.output import Output
from nvvl.quantize.pack import require_usable
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe
from nvvl.quantize.sharing import join_shares, largest_amaxes, take_share
from nvvl.quantize.spill import Spill, SpillFolder, open_spill
from nvvl.quantize.stored import StoredCalibration
from nvvl.quantize.targets import quantized_only
from nvvl.quantize.task import read_task
from nvvl.staging import resumable_stage

if TYPE_CHECKING:
    from nvvl.calib_data.manifest import CalibrationSet


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
    processes: Processes | None = None,
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
        stop: Asked after each block; the walk is interrupted if it says True on any process.
        command: The command line, for the manifest.
        from_calibration: The output of a finished run over the same source, whose amax of inputs
            are used in place of ``items``.
        limits: What of it may be in memory at once; changes no byte of the output.
        processes: Those that share the items, all of which make this call, with folders that all
            of them see; None works alone.

    Returns:
        What was written, as in ``manifest.json``.

    Raises:
        ConfigError: if config.json or the tokenizer cannot be used.
        CheckpointError: if source tensors are missing, unexpected, misshapen or not finite.
        RecipeError: if the recipe does not fit the model.
        DataError: if items are needed and there are none, fewer than processes, or one cannot be
            used.
        CalibrationError: if a linear gets no usable amax, or an item gives NaN or Inf.
        SourceError: if a file of the source cannot be read just now; finished blocks are kept.
        OutputError: if ``out`` exists, the disk is full, or an unfinished run of another recipe,
            source, calibration set or processor is there.
        HardwareError: if ``NVVL_KERNELS`` asks for kernels that this processor does not have.
        ReportedError: on other processes than the main one, in place of any of these.
        KeyboardInterrupt: if ``stop`` said True.
    """
    device = torch.device(device)
    group = processes or Processes(device, join=False)
    with ExitStack() as stack:
        with group.agreed():
            if device.type == "cpu":
                kernels.active()  # refuses here what NVVL_KERNELS cannot have, not blocks later
            task = read_task(source, recipe, items, from_calibration, group)
            share = take_share(task.items, group)
            output = None
            if group.is_main:
                output = stack.enter_context(
                    Output(
                        *(task.checkpoint, out, task.recipe, task.formats),
                        *(task.identify(device), task.items),
                        device=device,
                        overwrite=overwrite,
                        stored=task.stored,
                        read_from=() if items is None else items.files,
                    )
                )
        stage = resumable_stage(out)
        finished = output.journal.blocks if output else read_journal(stage.journal)[1]
        walk = Walk(
            *(task.checkpoint, task.formats, task.recipe, device),
            spills=SpillFolder(stage.root, index=group.index),
            processes=group,
            output=output,
            stored=task.stored,
            limits=limits,
        )
        try:
            walk.run(share, list(finished), progress=progress, stop=stop)
            with group.agreed():
                if output is not None:
                    output.write_files(command)
        except OutputError as error:
            if output is None:
                raise
            raise OutputError(output.explain(error)) from error
        with group.agreed():
            stack.close()
    return Manifest.read(out)


class Walk:
    """One pass over a checkpoint, by one of the processes that walk together."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Mapping[str, Format],
        recipe: Recipe,
        device: torch.device,
        *,
        spills: SpillFolder,
        processes: Processes,
        output: Output | None,
        stored: StoredCalibration | None = None,
        limits: Limits = UNLIMITED,
    ) -> None:
        """Take what the walk is made of.

        Args:
            checkpoint: The source.
            formats: Format of each linear.
            recipe: The recipe in force.
            device: Where blocks are run.
            spills: Where this process keeps its items between blocks.
            processes: Those that share the items.
            output: What finished blocks are given to; on the main process only.
            stored: The calibration that is packed from, if it is not found out anew.
            limits: What may be in memory at once.
        """
        self._checkpoint = checkpoint
        self._formats = formats
        self._recipe = recipe
        self._device = device
        self._spills = spills
        self._processes = processes
        self._output = output
        self._stored = stored
        self._limits = limits
        self._runner = BlockRunner(checkpoint, device)

    @torch.no_grad()
    def run(
        self,
        items: Sequence[Item],
        finished: Sequence[BlockRecord],
        *,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Visit every block: run it over the items where that is needed, and write its tensors.

        Args:
            items: This process's calibration items; empty if no input is calibrated.
            finished: The blocks that an earlier run had finished.
            progress: As in `quantize_checkpoint`.
            stop: As in `quantize_checkpoint`.
        """
        blocks = list_blocks(self._checkpoint.config)
        num_runs = count_runs(blocks, self._formats) if items else 0
        ticker = Ticker(progress, total=len(blocks) + 1 + num_runs * len(items))
        with self._processes.agreed():
            if self._output is not None:
                for record in finished:
                    self._output.restore(record)
        activations = None
        num_run = num_runs
        if len(finished) < num_runs:
            with self._processes.agreed():
                activations = self._open_activations(items, ticker)
            num_run = self._catch_up(activations, finished, ticker, stop)
        ticker.skip(len(finished) + num_run * len(items))
        ahead = self._limits.overlap
        left = blocks[len(finished) :]
        with (
            BlockReader(self._checkpoint, left, device=self._device, ahead=ahead) as reader,
            Background(threaded=ahead) as background,
        ):
            for index, name in enumerate(left, start=len(finished)):
                ticker.stage = name
                running = activations if index < num_runs else None
                room = self._spill_room() if running is not None else 0
                with self._processes.agreed():
                    found = self._visit(reader.take(name), running, index, room)
                    background.wait()  # an error of writing the block before is everybody's
                finish = self._agree_on(found)
                del found  # else the block before stays while the next one runs
                with self._processes.agreed():
                    background.submit(finish)  # without a thread it is written here
                del finish
                return_freed_memory()
                ticker.tick()
                self._stop_if_asked(stop, background)
            with self._processes.agreed():
                background.wait()
        with self._processes.agreed():
            ticker.stage = _REST
            if self._output is not None:
                self._output.copy_rest()
            ticker.tick()

    def _open_activations(self, items: Sequence[Item], ticker: Ticker) -> Activations:
        return Activations(
            items,
            Processor.from_folder(self._checkpoint.folder),
            device=self._device,
            tick=ticker.tick,
            budget_bytes=self._limits.activation_bytes,
        )

    def _stop_if_asked(
        self, stop: Callable[[], bool] | None, background: Background | None = None
    ) -> None:
        """End the run if any process was asked to, once the last block is written."""
        if stop is None or not any(self._processes.gather(stop())):
            return
        if background is not None:
            background.wait()
        if not self._processes.is_main:
            raise ReportedError("interrupted")
        raise KeyboardInterrupt

    def _catch_up(
        self,
        activations: Activations,
        finished: Sequence[BlockRecord],
        ticker: Ticker,
        stop: Callable[[], bool] | None,
    ) -> int:
        """Bring the items to where the finished blocks leave them; return how many were skipped."""
        num_run, spill = self._find_spill(finished)
        if spill is not None:
            drawn = [item for record in finished for item in record.items]
            activations.restore(spill, take_share(drawn, self._processes))
        names = [record.block for record in finished[num_run:]]
        with BlockReader(
            self._checkpoint, names, device=self._device, ahead=self._limits.overlap
        ) as reader:
            for count, name in enumerate(names, start=num_run + 1):
                ticker.stage = name
                room = self._spill_room()
                with self._processes.agreed():
                    block = reader.take(name)
                    run = partial(self._runner.run, block, activations)
                    activations.run_block(run, self._spills.file(count), room=room)
                self._spills.drop(before=count)
                self._stop_if_asked(stop)
        return num_run

    def _find_spill(self, finished: Sequence[BlockRecord]) -> tuple[int, Spill | None]:
        """Return how many blocks the latest items on disk have been through, and their file.

        Every process must have its own, whole, of the same block; else there are none.
        """
        for count in range(len(finished), 0, -1):
            hashes = finished[count - 1].spills
            if len(hashes) != self._processes.count or not all(hashes):
                continue
            spill = open_spill(self._spills.file(count), hashes[self._processes.index])
            if all(self._processes.gather(spill is not None)):
                return count, spill
        return 0, None

    def _visit(
        self, block: LoadedBlock, activations: Activations | None, index: int, room: int
    ) -> "_Found":
        """Run one block over this process's items, and find its amax."""
        if self._output is not None:
            self._output.require_calibrated_on(block.sha256)
        if activations is None:
            return _Found(block, self._weight_amaxes(block))
        num_drawn = len(activations.records)
        amaxes: dict[str, Amax] = {}

        def run() -> None:
            nonlocal amaxes
            amaxes = self._calibrate(block, activations)

        spill = activations.run_block(run, self._spills.file(index + 1), room=room)
        return _Found(block, amaxes, activations.records[num_drawn:], spill)

    def _agree_on(self, found: "_Found") -> Callable[[], None]:
        """Join what all processes found about a block; return what writes and records it."""
        said = self._processes.gather([found.spill, found.drawn])
        amaxes = share_qkv(largest_amaxes(found.amaxes, self._processes))
        with self._processes.agreed():
            require_usable(amaxes, self._formats)
        if self._output is None:
            return _nothing
        drawn = [(item_id, sha256) for item_id, sha256 in join_shares([d for _, d in said])]
        spills = [spill for spill, _ in said]
        return partial(self._output.finish_block, found.block, amaxes, drawn, spills)

    def _spill_room(self) -> int:
        """Return the bytes that this process's items may take on the disk."""
        room = None
        if self._output is not None:
            free = shutil.disk_usage(self._spills.path).free
            room = free - self._output.writer.bytes_to_come() - _SPARE_BYTES
        return self._processes.gather(room)[0] // self._processes.count

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


@dataclass(frozen=True)
class _Found:
    """What one process found about a block: amax, items drawn for it, hash of their spill."""

    block: LoadedBlock
    amaxes: Mapping[str, Amax]
    drawn: Sequence[tuple[str, str]] = ()
    spill: str = ""


def _nothing() -> None:
    """Stand for the writing of a block on processes that write none."""
