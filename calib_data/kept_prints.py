"""Fingerprints of drawn suites, kept between builds: to draw all of them takes minutes.

    ${XDG_CACHE_HOME:-~/.cache}/nvvl/suite-NAME-DIGEST.npz

Of pictures the coarse edges are kept, of texts the hashes: some 75 MB for all suites. That is
enough to rule out that a set shares anything with a suite; where it is not ruled out, the suite is
drawn after all and compared in full. The digest is of all that decides how suites are drawn, so a
new version of nvvl draws them anew, and removes what an old one kept.
"""

import glob
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nvvl.calib_data.fingerprints import Fingerprints, coarse_matches, stack_coarse


@dataclass(frozen=True)
class KeptPrints:
    """What is kept of suites that were drawn.

    Attributes:
        folder: Where; made when it is needed.
        digest: Of all that decides how they are drawn.
    """

    folder: Path
    digest: str

    def has(self, name: str) -> bool:
        """Tell whether a suite was drawn before."""
        return self._path(name).exists()

    def rules_out(self, name: str, ours: Fingerprints) -> bool:
        """Tell whether it is known that a set shares nothing with a suite."""
        try:
            with np.load(self._path(name), allow_pickle=False) as kept:
                pictures, texts = kept["pictures"], kept["texts"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False  # not there, or damaged: the suite itself says it
        if ours.texts.keys() & {text.tobytes() for text in texts}:
            return False
        return not len(coarse_matches(stack_coarse(ours), pictures))

    def keep(self, name: str, prints: Fingerprints) -> None:
        """Keep what a suite was found to have; where it cannot be kept, it is drawn again."""
        texts = np.frombuffer(b"".join(sorted(prints.texts)), dtype="V8")
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                path = Path(folder) / "prints.npz"
                np.savez_compressed(path, pictures=stack_coarse(prints), texts=texts)
                for old in self.folder.glob(f"suite-{glob.escape(name)}-*.npz"):
                    old.unlink()
                path.replace(self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"suite-{name}-{self.digest}.npz"
