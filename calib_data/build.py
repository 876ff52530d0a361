"""Builds a calibration set: from the sources of a spec to a folder with every item in it.

Items are made one after the other and stored at once. What cannot be used, is longer than the
limit, or is there already is left out, counted and named in the manifest, and the source's next
item takes its place; a source that runs out before its count is an error. Nothing is ever cut.

Every source is listed before anything is made, so that a missing file is named at once. Before the
folder gets its name, its items are compared with the items of evaluation suites, which other
processes draw while the items are made; a set that is apart from them by its split needs none.
"""

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nvvl
from nvvl.calib_data.built import (
    FORMAT,
    SHEET,
    VERSION,
    Row,
    item_row,
    write_manifest,
    write_table,
)
from nvvl.calib_data.comparison import Suites, comparison
from nvvl.calib_data.contact_sheet import SheetMaker
from nvvl.calib_data.counts import count_tokens, describe_processor
from nvvl.calib_data.fingerprints import Fingerprints, Overlap
from nvvl.calib_data.items import Item
from nvvl.calib_data.kept_prints import KeptPrints
from nvvl.calib_data.mixture import Candidate, finish_item, list_candidates
from nvvl.calib_data.source_spec import Documents, Hub, Shards, Source
from nvvl.calib_data.spec import SetSpec
from nvvl.calib_data.summary import summarize
from nvvl.errors import DataError, name_some, require_unread, writing
from nvvl.model.processor import Processor
from nvvl.progress import Progress
from nvvl.staging import staged_folder

_NOTHING: Suites = {}

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
    against: Suites = _NOTHING,
    kept: KeptPrints | None = None,
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
        suites: Items of each suite that the set must not overlap with. They are of the split
            ``held_out``, so a set of nothing but generated documents of the split ``train`` is
            apart from them, and they are not drawn.
        against: Other sets that it must not overlap with; these are always compared.
        kept: What is kept of suites that an earlier build drew.
        skip_bad: Leave out items that cannot be made, in place of raising.
        allow_overlap: Keep items that overlap with a suite, and record them.
        overwrite: Replace an ``out`` that is a built set.
        jobs: Processes that draw them meanwhile; 1 draws them afterwards, in this one.
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
    require_unread(out, [base], within=True)  # OUT mostly lies beside the spec
    read = [base / path for path in paths if path]
    apart = _are_apart(spec.sources)
    with (
        staged_folder(out, sources=read, overwrite=overwrite, kind=FORMAT) as folder,
        writing(out),
    ):
        builder = _Builder(spec, folder, base, processor, skip_bad, progress)
        with comparison({} if apart else suites, against, kept, jobs) as compare:
            builder.add_all()
            overlaps = compare(builder.prints, progress)
        if not allow_overlap:
            _refuse_overlaps(overlaps)
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
            "overlap": {
                "suites": [*([] if apart else suites), *against],
                "apart": list(suites) if apart else [],
                "found": [asdict(overlap) for overlap in overlaps],
            },
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


def _refuse_overlaps(overlaps: Sequence[Overlap]) -> None:
    if overlaps:
        named = [
            f"{found.item_id} shares a {found.kind} with {found.other_id} of {found.suite}"
            for found in overlaps
        ]
        raise DataError(
            "the set overlaps with what is held out from it: "
            f"{name_some(named, limit=_NUM_NAMED)}; leave these out, or say --allow-overlap, which "
            "records them"
        )


def _are_apart(sources: Sequence[Source]) -> bool:
    """Tell whether no suite can have an item of these: no answer is of both splits."""
    return all(isinstance(source, Documents) and source.split == "train" for source in sources)


def _versions() -> dict[str, str]:
    versions = {"nvvl": nvvl.__version__}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return versions
