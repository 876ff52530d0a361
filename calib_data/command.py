"""The verb ``nvvl calib show``."""

import os
import re
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Annotated

import typer

from nvvl.errors import DataError, OutputError, writing
from nvvl.options import CalibArgument, JsonOption, SeedOption

_MOST_NAME = 100  # bytes of an id in the name of a file
_NOT_IN_NAMES = re.compile(r"[/\x00-\x1f\x7f]")


def show(
    spec: CalibArgument = "default",
    *,
    samples: Annotated[int, typer.Option(min=1, help="Items to look at.")] = 8,
    save: Annotated[
        Path | None, typer.Option(help="New folder to save images and video frames in, as PNG.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show a built set in numbers, and items of any: pictures, questions, answers."""
    from nvvl.calib_data.built import MANIFEST, SHEET, is_built, read_manifest
    from nvvl.calib_data.items import item_hash
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.calib_data.summary import summary_tables
    from nvvl.console import print_json, print_table, without_controls

    manifest = read_manifest(Path(spec)) if is_built(Path(spec)) else None
    items = load_calibration_set(spec, num_items=samples, seed=seed).items
    if save is not None:
        _make_new_folder(save)
    if manifest is not None and not as_json:
        try:
            tables = summary_tables(manifest)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{Path(spec) / MANIFEST}: not what nvvl calib build writes ({error!r:.80}); build "
                "the set again"
            ) from None
        for table in tables:
            print_table(table)
        print(f"{Path(spec) / SHEET}\n")
    rows = []
    for place, item in enumerate(items):
        pictures = [*item.images, *(frame for video in item.videos for frame in video.frames)]
        row = {"id": item.item_id, "sha256": item_hash(item), "domain": item.domain}
        turns = [asdict(message) for message in item.messages]
        rows.append({**row, "pictures": [list(p.size) for p in pictures], "messages": turns})
        if save is not None:
            short = os.fsencode(_NOT_IN_NAMES.sub("-", item.item_id))[:_MOST_NAME]
            name = f"{place}-{short.decode(errors='ignore')}"
            for number, picture in enumerate(pictures):
                path = save / f"{name}-{number}.png"
                with writing(path):
                    picture.save(path)
        if not as_json:
            sizes = (f"{p.width}x{p.height}" for p in pictures)
            print(without_controls(" ".join(map(str, (*row.values(), *sizes)))))
            for message in item.messages:
                print(without_controls(f"  {message.role}: {shorten(message.content, 90)}"))
    if as_json:
        print_json(rows if manifest is None else {**manifest, "items": rows})


def _make_new_folder(path: Path) -> None:
    """Make a folder that was not there, so that nothing in it can be overwritten."""
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{path}: required a new folder ({error.strerror})") from None
