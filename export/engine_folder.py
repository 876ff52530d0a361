"""A folder of engines as it was written: complete, unchanged, and which library runs it."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvvl.errors import EngineError, HardwareError, describe_misfit
from nvvl.export.engine_targets import BUILDERS, Builder
from nvvl.model.hashing import changed_files
from nvvl.staging import MANIFEST_NAME


@dataclass(frozen=True, kw_only=True)
class EngineFolder:
    """What ``nvvl export engine`` wrote.

    Attributes:
        folder: Where it lies.
        manifest: Content of ``manifest.json``.
        builder: Whose engines they are.
    """

    folder: Path
    manifest: Mapping[str, Any]
    builder: Builder

    def import_library(self) -> Any:
        """Import the package that runs these engines.

        Raises:
            HardwareError: if it is not installed.
        """
        try:
            return importlib.import_module(self.builder.module)
        except ImportError as error:
            raise HardwareError(
                f"{self.folder}: its engines need {self.builder.module} ({error}); install it "
                f"with: pip install 'nvvl[{self.builder.extra}]'"
            ) from None


def open_engine_folder(folder: Path) -> EngineFolder:
    """Check every file of a folder of engines against its manifest.

    Raises:
        EngineError: if it is not such a folder, or a file was changed or lost.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        engines = {entry["file"]: entry["sha256"] for entry in manifest["engines"].values()}
        recorded = {**manifest["files"], **engines}
        builder = BUILDERS[manifest["builder"]["name"]]
    except OSError as error:
        raise EngineError(
            f"{path}: cannot be read ({error.strerror}); required a folder that nvvl export engine "
            "wrote"
        ) from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"{path}: not a manifest of engines ({describe_misfit(error)}); build again"
        ) from None
    changed = changed_files(folder, recorded)
    if changed:
        raise EngineError(
            f"{folder}: {', '.join(changed)}: changed or lost since the engines were built; build "
            "again"
        )
    return EngineFolder(folder=folder, manifest=manifest, builder=builder)
