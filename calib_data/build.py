"""Builds a calibration set: from the sources of a spec to a folder with every item in it.

Items are made one after the other and stored at once. What cannot be used, is longer than the
limit, or is there already is left out, counted and named in the manifest, and the source's next
item takes its place; a source that runs out before its count is an error. Nothing is ever cut.

Every source is listed before anything is made, so that a missing file is named at once. Before the
folder gets its name, its items are compared with the items of evaluation suites, which other
processes draw while the items are made.
"""

import importlib.metadata
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nvvl
from nvvl.calib_data.built import (
    FORMAT,
    SHEET,
    VERSION,
    Row,
    is_built,
    item_row,
    write_manifest,
    write_table,
)
from nvvl.calib_data.contact_sheet import SheetMaker
from nvvl.calib_data.counts import count_tokens, describe_processor
from nvvl.calib_data.fingerprints import Fingerprints, Overlap, find_overlaps
from nvvl.calib_data.items import Item
from nvvl.calib_data.mixture import Candidate, finish_item, list_candidates
from nvvl.calib_data.source_spec import Documents, Hub, Shards, Source
from nvvl.calib_data.spec import SetSpec
from nvvl.calib_data.summary import summarize
from nvvl.errors import DataError, OutputError, require_unread, writing
from nvvl.model.processor import Processor
from nvvl.progress import Progress

# An evaluation suite by name, as its items.
Suites = Mapping[str, Callable[[], Iterable[Item]]]
# What of a suite is compared, by its name.
SuitePrints = Iterable[tuple[str, Fingerprints]]

_VERSIONS = ("datasets", "pillow", "pyarrow", "av", "pypdfium2")
_NUM_NAMED = 5  # overlaps that an error names
_MOST_LEFT_OUT = 1000  # in a row, of a source that has no end, or is as good as endless


@dataclass
class SourceRecord:
    """What became of a source.

    Attributes:
        bad: Items that could not be made, each with the reason.
        too_long: Items over the limit, each with its tokens.
        duplicates: Items equal to an earlier one of the set.
    """

    name: str
    kind: str
    num_items: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)
    too_long: list[dict[str, Any]] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)


def build_set(
    spec: SetSpec,
    out: Path,
    *,
    base: Path,
    processor: Processor,
    suites: Suites,
    skip_bad: bool = False,
    allow_overlap: bool = False,
    overwrite: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build a set.

    Args:
        spec: What it holds.
        out: The folder to make.
        base: Folder that the paths of the spec are relative to.
        processor: Of ``spec.model``; counts the tokens.
        suites: Items of each suite that the set must not overlap with.
        skip_bad: Leave out items that cannot be made, in place of raising.
        allow_overlap: Keep items that overlap with a suite, and record them.
        overwrite: Replace an ``out`` that is a built set.
        jobs: Processes that draw the suites meanwhile; 1 draws them afterwards, in this one.
        progress: Called with a source or suite, items done and items in all.

    Returns:
        The manifest.

    Raises:
        DataError: if a source or an item cannot be used, a source has too few items, or items
            overlap with a suite.
        OutputError: if ``out`` exists and is not to be replaced, or cannot be written; a finished
            set that only did not get its name is kept, and the error says where.
    """
    paths = (getattr(source, "path", None) for source in spec.sources)
    require_unread(out, [base, *(base / path for path in paths if path)])
    with _staged(out, overwrite=overwrite) as folder:
        builder = _Builder(spec, folder, base, processor, skip_bad, progress)
        with _suite_prints(suites, jobs) as theirs:
            builder.add_all()
            overlaps = _check_overlaps(builder.prints, theirs, len(suites), allow_overlap, progress)
        write_table(builder.rows, folder)
        builder.sheet.save(folder / SHEET)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "name": spec.name,
            "spec": spec.to_dict(),
            "processor": describe_processor(processor),
            "summary": summarize(builder.rows),
            "sources": [asdict(record) for record in builder.records],
            "overlap": {"suites": list(suites), "found": [asdict(overlap) for overlap in overlaps]},
            "versions": _versions(),
        }
        write_manifest(manifest, folder)
    return manifest


class _Builder:
    """Gathers the items of one set, one source after the other."""

    def __init__(
        self,
        spec: SetSpec,
        folder: Path,
        base: Path,
        processor: Processor,
        skip_bad: bool,
        progress: Progress | None,
    ) -> None:
        """List every source.

        Raises:
            DataError: if one of them cannot be listed.
        """
        self.rows: list[Row] = []
        self.records: list[SourceRecord] = []
        self.prints = Fingerprints()
        self.sheet = SheetMaker()
        self._spec = spec
        self._folder = folder
        self._processor = processor
        self._skip_bad = skip_bad
        self._progress = progress
        self._hashes: dict[str, str] = {}
        self._listed = [_list(source, spec.seed, base) for source in spec.sources]

    def add_all(self) -> None:
        """Take the items of every source."""
        for source, candidates in zip(self._spec.sources, self._listed, strict=True):
            self._add(source, candidates)

    def _add(self, source: Source, candidates: Iterator[Candidate]) -> None:
        """Take the items of a source, in the order the source has them."""
        record = SourceRecord(name=source.name, kind=source.kind)
        self.records.append(record)
        taken: list[tuple[int, Row]] = []
        ids: set[str] = set()
        num_left_out = 0  # in a row
        for place, candidate in _named(source, candidates):
            try:
                item = finish_item(source, candidate.load())
                if item.item_id in ids:
                    raise DataError(f"{item.item_id}: is the id of an earlier item")
                row = self._make_row(source, item, record)
            except DataError as error:
                self._require_skip(source, error)
                record.bad.append({"id": candidate.item_id, "reason": str(error)})
                row = None
            if row is not None:
                ids.add(row["id"])
                taken.append((place, row))
            self._report(source, len(taken))
            num_left_out = num_left_out + 1 if row is None else 0
            has_no_end = isinstance(source, Documents | Hub | Shards)
            if len(taken) == source.count or (has_no_end and num_left_out == _MOST_LEFT_OUT):
                break
        _require_enough(source, record, len(taken))
        record.num_items = len(taken)
        self.rows += [row for _, row in sorted(taken, key=lambda pair: pair[0])]

    def _make_row(self, source: Source, item: Item, record: SourceRecord) -> Row | None:
        """Store an item; None if it is too long, or there already."""
        try:
            counts = count_tokens(item, self._processor)
        except DataError as error:
            raise DataError(f"{item.item_id}: {error}") from None
        limit = self._spec.max_tokens
        if limit is not None and counts.total > limit:
            record.too_long.append({"id": item.item_id, "tokens": counts.total})
            return None
        row = item_row(item, counts, source.name, self._folder)
        if row["sha256"] in self._hashes:
            record.duplicates.append(item.item_id)
            return None
        self._hashes[row["sha256"]] = item.item_id
        self.prints.add(item)
        self.sheet.add(item)
        return row

    def _require_skip(self, source: Source, error: DataError) -> None:
        if not self._skip_bad:
            raise DataError(f"{source.name}: {error}; --skip-bad leaves bad items out") from None

    def _report(self, source: Source, num_taken: int) -> None:
        if self._progress is not None:
            self._progress(source.name, num_taken, max(source.count or 0, num_taken))


def _list(source: Source, seed: int, base: Path) -> Iterator[Candidate]:
    try:
        return list_candidates(source, seed=seed, base=base)
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from None


def _named(source: Source, candidates: Iterator[Candidate]) -> Iterator[Candidate]:
    """Name the source in what goes wrong while a stream is read."""
    try:
        yield from candidates
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from None


def _require_enough(source: Source, record: SourceRecord, num_taken: int) -> None:
    if num_taken == 0 or num_taken < (source.count or 0):
        first = f"; the first bad one: {record.bad[0]['reason']}" if record.bad else ""
        raise DataError(
            f"{source.name}: required {source.count or 'at least 1'} items, got {num_taken} "
            f"({len(record.bad)} bad, {len(record.too_long)} too long, {len(record.duplicates)} "
            f"twice{first}); lower count, or give the source more"
        )


def _check_overlaps(
    prints: Fingerprints,
    suites: SuitePrints,
    num_suites: int,
    allow: bool,
    progress: Progress | None,
) -> list[Overlap]:
    overlaps: list[Overlap] = []
    for number, (name, theirs) in enumerate(suites, start=1):
        overlaps += find_overlaps(prints, theirs, name)
        if progress is not None:
            progress("compared with suites", number, num_suites)
    if overlaps and not allow:
        named = ", ".join(
            f"{overlap.item_id} shares a {overlap.kind} with {overlap.other_id} of {overlap.suite}"
            for overlap in overlaps[:_NUM_NAMED]
        )
        rest = f" and {len(overlaps) - _NUM_NAMED} more" if len(overlaps) > _NUM_NAMED else ""
        raise DataError(
            f"the set overlaps with what is held out from it: {named}{rest}; leave these out, "
            "or say --allow-overlap, which records them"
        )
    return overlaps


@contextmanager
def _suite_prints(suites: Suites, jobs: int) -> Iterator[SuitePrints]:
    """Give the fingerprints of every suite in order, drawn beside whatever is done meanwhile."""
    if jobs == 1:
        yield ((name, _prints_of(items)) for name, items in suites.items())
        return
    # spawned, for forking a process that has threads of torch's can hang
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield zip(suites, pool.map(_prints_of, suites.values()), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _prints_of(items: Callable[[], Iterable[Item]]) -> Fingerprints:
    return Fingerprints.of(items())


@contextmanager
def _staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write in, which becomes ``out`` when everything is written."""
    _require_free(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror})") from None
    try:
        with writing(out):
            folder.chmod(0o755)
            yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _replace(out, folder, overwrite=overwrite)


def _require_free(out: Path, *, overwrite: bool) -> None:
    with writing(out):
        if not out.exists() and not out.is_symlink():
            return
        if not overwrite:
            raise OutputError(f"{out}: exists; name another, or say --overwrite")
        if out.is_symlink() or not is_built(out):
            raise OutputError(f"{out}: exists; it is no calibration set, or a link; name another")


def _replace(out: Path, folder: Path, *, overwrite: bool) -> None:
    """Give a finished folder the name ``out``; what stands there is removed after that."""
    kept = f"the finished set is kept as {folder}"
    try:
        _require_free(out, overwrite=overwrite)
    except OutputError as error:  # made by somebody else meanwhile
        raise OutputError(f"{error}; {kept}") from None
    old = folder.with_name(f"{folder.name}.old")
    try:
        if out.exists():
            out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    except OSError as error:
        raise OutputError(
            f"{out}: the finished set cannot get this name ({error.strerror}); {kept}"
        ) from error
    if old.exists():
        with writing(old):
            shutil.rmtree(old)


def _versions() -> dict[str, str]:
    versions = {"nvvl": nvvl.__version__}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return versions
