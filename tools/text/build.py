"""Make calib_data/text: the word list and the prose that generated documents draw from.

Words come from Debian's `scowl` (levels 10, 20 and part of 35, the commonest first), prose from
the King James Bible of Debian's `bible-kjv`, whose text is in the public domain. Books of the
held-out file are other books than those of the train file. Run once, on Debian:

    python tools/text/build.py --out calib_data/text
"""

import argparse
import random
import re
import subprocess
from pathlib import Path

SCOWL = Path("/usr/share/dict/scowl")
NUM_WORDS = 20_000
# last chapter and verse are clipped by `bible` to what the book has
TRAIN_BOOKS = ("gen1:1-50:26", "1sam1:1-31:13", "prov1:1-31:31", "luke1:1-24:53")
HELD_OUT_BOOKS = ("ruth1:1-4:22", "esther1:1-10:3", "jonah1:1-4:11")
# a document generator has no business printing these
UNWANTED = re.compile(
    r"fuck|shit|cunt|nigg|whore|rape|slut|bitch|piss|fag|cock|dyke|porn|nazi|retard|nude|sex|ejac"
    r"|violat|abus|masturb|breast|genital|penis|vagin|orgas|lynch|molest|racis|incest|pimp|^tits"
    r"|boob|horny|naked|pubic|^anal$|^anus|scrot|testic|condom|bastard|^damn|circumc|erotic|suck"
    r"|murder|suicid|terroris|tortur|slave|^hell$|negro|lesb|homosex|fart|turd|crap|^ass$"
)


def read_level(level: int) -> list[str]:
    """Read the plain lower-case words of one SCOWL level, American spelling."""
    words: set[str] = set()
    for variety in ("english", "american"):
        text = (SCOWL / f"{variety}-words.{level}").read_text(encoding="latin-1")
        words.update(re.findall(r"^[a-z]{2,12}$", text, flags=re.MULTILINE))
    return sorted(word for word in words if not UNWANTED.search(word))


def choose_words() -> list[str]:
    """Take levels 10 and 20 whole and fill up from level 35 with a fixed seed."""
    common = sorted({*read_level(10), *read_level(20)})
    rest = [word for word in read_level(35) if word not in set(common)]
    return sorted(common + random.Random(0).sample(rest, NUM_WORDS - len(common)))


def read_book(verses: str) -> str:
    """Print one book, a verse a line, without verse numbers and chapter headings."""
    done = subprocess.run(["bible", "-l2000", verses], capture_output=True, text=True, check=True)
    lines = re.findall(r"^\s*\d+ (\D+)$", done.stdout, flags=re.MULTILINE)
    return "".join(f"{line.strip()}\n" for line in lines if not UNWANTED.search(line))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the word list and the prose files.")
    parser.add_argument("--out", type=Path, default=Path("calib_data/text"))
    out = parser.parse_args().out
    (out / "words.txt").write_text("\n".join(choose_words()) + "\n", encoding="ascii")
    for name, books in (("train", TRAIN_BOOKS), ("held_out", HELD_OUT_BOOKS)):
        text = "".join(read_book(book) for book in books)
        (out / f"prose_{name}.txt").write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
