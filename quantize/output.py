"""Writes what the walk has found out: blocks packed, tables copied, each finished block recorded.

Only the main process of a run has one of these. What is not quantized is copied byte for byte in
its stored dtype. What the bytes on disk are is said by hashes of what was written; whether it is
good is said by ``nvvl verify``, which reads it back with other code.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from nvvl.calib_data.items import Item
from nvvl.errors import CalibrationError
from nvvl.model.checkpoint import Checkpoint, CheckpointWriter
from nvvl.quantize.amaxes import Amax
from nvvl.quantize.block_names import EMBEDDINGS
from nvvl.quantize.blocks import LoadedBlock, finite_pieces
from nvvl.quantize.journal import BlockRecord, Journal
from nvvl.quantize.layout import build_layout
from nvvl.quantize.manifest import Manifest, TensorRecord, hash_files, library_versions
from nvvl.quantize.pack import pack_linear
from nvvl.quantize.recipe import Format, Recipe
from nvvl.quantize.side_files import write_side_files
from nvvl.quantize.spill import SpillFolder
from nvvl.quantize.stored import StoredCalibration
from nvvl.staging import resumable_folder


class Output:
    """The output of one run, until it is complete and takes its name.

    Attributes:
        journal: The finished blocks.
        writer: Where tensors go.
        amaxes: Of every quantized linear written so far.
        source_hashes: SHA-256 of every source tensor read so far.
        written: Every tensor written so far.
        items: (id, SHA-256) of the calibration items that were run.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        out: Path,
        recipe: Recipe,
        formats: Mapping[str, Format],
        identity: Mapping[str, str],
        items: Sequence[Item],
        *,
        device: torch.device,
        overwrite: bool,
        stored: StoredCalibration | None,
        read_from: Sequence[Path] = (),
    ) -> None:
        """Open the staging folder, or the one that a killed run left.

        Args:
            checkpoint: The source.
            out: The folder that will be made.
            recipe: The recipe in force.
            formats: Format of each linear.
            identity: What the run is made from, as `nvvl.quantize.identity.describe_run` says it.
            items: All calibration items of the run, whichever process runs them.
            device: Where weights are packed.
            overwrite: As in `nvvl.quantize.walk.quantize_checkpoint`.
            stored: The calibration that is packed from, if it is not found out anew.
            read_from: Where the items come from.

        Raises:
            OutputError: if ``out`` exists, the disk lacks the space, or an unfinished run of
                something else is there.
        """
        self.amaxes: dict[str, Amax] = {}
        self.source_hashes: dict[str, str] = {}
        self.written: dict[str, TensorRecord] = {}
        self.items: list[tuple[str, str]] = []
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._formats = formats
        self._device = device
        self._stored = stored
        sources = [checkpoint.folder, *read_from, *([stored.folder] if stored else [])]
        layout = build_layout(checkpoint, formats)
        self._specs = {spec.name: spec for spec in layout}
        with ExitStack() as stack:
            self._stage = stack.enter_context(
                resumable_folder(out, sources=sources, overwrite=overwrite)
            )
            self.journal = stack.enter_context(
                Journal(self._stage, identity, items, overwrite=overwrite)
            )
            self.writer = stack.enter_context(
                CheckpointWriter(self._stage.output, layout, resume=self.journal.digests)
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> "Output":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the output its name, or keep what a resumed run needs."""
        self._stack.__exit__(kind, error, trace)

    def restore(self, record: BlockRecord) -> None:
        """Take a finished block from the journal; write again what never reached the disk."""
        self.source_hashes |= record.source
        self.written |= record.written
        self.amaxes |= record.amaxes
        self.items += record.items
        lost = record.written.keys() - self.writer.written
        linears = {fqn for fqn in record.amaxes if any(n.startswith(f"{fqn}.") for n in lost)}
        for fqn in linears:
            self._pack(fqn, record.amaxes[fqn], self._checkpoint.load(f"{fqn}.weight"))
        for name in lost:
            if name.rpartition(".")[0] not in record.amaxes:
                self._copy_pieces(name)

    def finish_block(
        self,
        block: LoadedBlock,
        amaxes: Mapping[str, Amax],
        drawn: Sequence[tuple[str, str]],
        spills: Sequence[str],
    ) -> None:
        """Pack and write a block, and record it as finished.

        Args:
            block: Its weights.
            amaxes: Of its quantized linears.
            drawn: (id, SHA-256) of the items that were drawn for this block.
            spills: SHA-256 of the items after it, by process.
        """
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
        self.journal.append(
            BlockRecord(
                block=block.name,
                source=source,
                written=written,
                amaxes=amaxes,
                items=drawn,
                spills=spills,
            )
        )
        if all(spills):
            SpillFolder(self._stage.root, index=0).drop(
                before=len(self.journal.blocks), every_process=True
            )

    def copy_rest(self) -> None:
        """Copy the tensors that are no block's."""
        for name in self._checkpoint.tensors:
            if name not in self.source_hashes:
                self._copy_pieces(name)

    def write_files(self, command: Sequence[str]) -> Manifest:
        """Complete the weight files and write all others; the manifest last."""
        self.writer.finish()
        folder = self._stage.output
        write_side_files(folder, self._checkpoint, self._recipe, self._formats, self.amaxes)
        manifest = Manifest(
            format=self._recipe.name,
            command=tuple(command),
            source=self.source_hashes,
            tensors=self.written,
            files=hash_files(folder),
            items=self._stored.items if self._stored else self.items,
            versions=library_versions(),
        )
        manifest.write(folder)
        return manifest

    def explain(self, error: Exception) -> str:
        """Say what of the output is kept and what is missing, after an error of writing."""
        still = self.writer.bytes_to_come()
        needed = f"{still} bytes" if still else "its small files"
        return (
            f"{error} (the output still needs {needed}; "
            f"{len(self.journal.blocks)} finished blocks are kept in {self._stage.root})"
        )

    def require_calibrated_on(self, hashes: Mapping[str, str]) -> None:
        """Refuse source tensors other than those that a stored calibration was made on.

        Raises:
            CalibrationError: naming the first one.
        """
        stored = self._stored
        for name, sha256 in hashes.items():
            if stored is not None and stored.source.get(name) != sha256:
                raise CalibrationError(
                    f"{stored.folder}: was calibrated on another source ({name} differs); "
                    "calibrate again, or give the MODEL it was made from"
                )

    def _pack(self, fqn: str, amax: Amax, weight: Tensor) -> dict[str, TensorRecord]:
        weight = weight.to(device=self._device, dtype=torch.bfloat16)
        tensors = pack_linear(weight, self._formats[fqn], amax)
        return {f"{fqn}.{leaf}": self._write(f"{fqn}.{leaf}", t) for leaf, t in tensors.items()}

    def _write(self, name: str, tensor: Tensor, *, sha256: str | None = None) -> TensorRecord:
        spec = self._specs[name]
        if name in self.writer.written:  # one of a linear's tensors was lost, this one was not
            return self.written[name]
        return TensorRecord(self.writer.write(name, tensor, sha256=sha256), spec.dtype, spec.shape)

    def _copy_pieces(self, name: str) -> TensorRecord:
        """Copy a tensor that is not read whole: one hash says what was read and written."""
        info = self._checkpoint.info(name)
        sha256 = self.writer.write_pieces(name, finite_pieces(info))
        self.require_calibrated_on({name: sha256})
        self.source_hashes[name] = sha256
        self.written[name] = TensorRecord(sha256, info.dtype, info.shape)
        return self.written[name]
