"""Cut the Debian fonts of families.toml down to printable ASCII for calib_data/fonts.

The generator of documents must draw the same pixels on every machine, so it cannot rely on
fonts that happen to be installed. Each face is reduced to the 95 printable ASCII characters,
without hinting, kerning or layout tables, and renamed: several licences reserve the original
name for unmodified copies. Copyright notices stay inside the files.

Run once, on Debian with the packages of families.toml and with fonttools installed:

    python tools/fonts/subset.py --root /usr/share --out calib_data/fonts
"""

import argparse
import json
import logging
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

PRINTABLE = range(0x20, 0x7F)
COPYRIGHT, FAMILY, STYLE, UNIQUE, FULL, POSTSCRIPT = 0, 1, 2, 3, 4, 6


@dataclass(frozen=True)
class Face:
    """One font file to cut."""

    source: Path
    file: str
    family: str
    style: str
    kind: str
    split: str
    license: str
    package: str
    copyright: str | None


def read_faces(families: Path, root: Path) -> list[Face]:
    """List the faces of families.toml, with the file names they will have."""
    rows = tomllib.loads(families.read_text(encoding="utf-8"))["family"]
    faces: list[Face] = []
    for row in rows:
        for entry in row["files"]:
            source = root / entry["path"]
            faces.append(
                Face(
                    source=source,
                    file=f"nvvl-{len(faces):03d}{source.suffix.lower()}",
                    family=row["name"],
                    style=entry["style"],
                    kind=row["kind"],
                    split=row["split"],
                    license=row["license"],
                    package=row["package"],
                    copyright=row.get("copyright"),
                )
            )
    return faces


def cut(face: Face, out: Path) -> int:
    """Write the ASCII subset of one face and return its size in bytes."""
    font = TTFont(face.source, recalcTimestamp=False)  # the same bytes each time
    missing = [chr(code) for code in PRINTABLE if code not in (font.getBestCmap() or {})]
    if missing:
        raise SystemExit(f"{face.source}: has no glyph for {''.join(missing)!r}")
    copyright_notice = face.copyright or font["name"].getDebugName(COPYRIGHT)
    if not copyright_notice:
        raise SystemExit(f"{face.source}: has no copyright notice; give one in families.toml")
    options = subset.Options(
        hinting=False,
        layout_features=[],
        notdef_outline=True,
        desubroutinize=True,
        name_IDs=[],
        drop_tables=[*subset.Options._drop_tables_default, "kern", "GPOS", "GSUB", "GDEF", "meta"],
    )
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=PRINTABLE)
    cutter.subset(font)
    rename(font, face.file.partition(".")[0], copyright_notice)
    font.save(out / face.file)
    return (out / face.file).stat().st_size


def rename(font: TTFont, name: str, copyright_notice: str) -> None:
    """Replace every name in the font by a neutral one, and keep the copyright notice."""
    family = name.replace("-", " ")
    table = font["name"]
    table.names = []
    for key, text in (
        (COPYRIGHT, copyright_notice),
        (FAMILY, family),
        (STYLE, "Regular"),
        (UNIQUE, name),
        (FULL, family),
        (POSTSCRIPT, name),
    ):
        table.setName(text, key, 3, 1, 0x409)
    if "CFF " in font:
        cff = font["CFF "].cff
        cff.fontNames = [name]
        top = cff.topDictIndex[0]
        for entry in ("FullName", "FamilyName", "Notice", "Copyright", "version", "Weight"):
            top.rawDict.pop(entry, None)
        top.rawDict.update(FullName=family, FamilyName=family)


def package_version(package: str) -> str:
    """Ask dpkg for the installed version of a package."""
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", package],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def write_tables(faces: list[Face], out: Path) -> None:
    """Write index.json, which the code reads, and the table of README.md."""
    keys = ("file", "family", "style", "kind", "split")
    rows = [{key: getattr(face, key) for key in keys} for face in faces]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (out / "index.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    head = "| file | family | style | kind | split | license | Debian package |\n"
    table = head + "|---|---|---|---|---|---|---|\n"
    for face in faces:
        version = package_version(face.package)
        table += (
            f"| {face.file} | {face.family} | {face.style} | {face.kind} | {face.split} "
            f"| {face.license} | {face.package} {version} |\n"
        )
    readme = out / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text[: text.index("| file |")] + table, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut fonts down to printable ASCII.")
    parser.add_argument("--root", type=Path, default=Path("/usr/share"))
    parser.add_argument("--out", type=Path, default=Path("calib_data/fonts"))
    arguments = parser.parse_args()
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # each dropped table is a warning
    faces = read_faces(Path(__file__).with_name("families.toml"), arguments.root)
    size_bytes = sum(cut(face, arguments.out) for face in faces)
    write_tables(faces, arguments.out)
    print(f"{len(faces)} faces, {size_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
