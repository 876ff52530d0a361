"""Proof that a folder, and the source it was made from, are the bytes the manifest was made of.

The hashes say that nothing changed since the writer ended; they do not say that the writer was
right (`nvvl.export.value_proof` does).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nvvl.errors import CheckpointError, describe_misfit
from nvvl.export.checks import Check, judge, not_checked
from nvvl.export.rules_config import find_copied_files
from nvvl.export.tensor_files import CALIBRATION_NAME, hash_tensor
from nvvl.export.view import CheckpointView
from nvvl.model.hashing import changed_files

# SHA-256, dtype, shape
_Entry = tuple[str, str, tuple[int, ...]]

_WRITTEN = ("H1", "written tensors have the manifest's hashes")
_SOURCE = ("H2", "source tensors have the manifest's hashes")
_FILES = ("H3", "side files have the manifest's hashes")

# Written beside weights and copied files; the manifest must have all of them.
_MADE = ("config.json", "hf_quant_config.json", "recipe.json", CALIBRATION_NAME)


@dataclass
class HashProof:
    """Collects hashes tensor by tensor, then compares them with the manifest.

    Attributes:
        tensors: Recorded hash, dtype and shape of each written tensor.
        source_tensors: Recorded hash of each source tensor.
        files: Recorded hash of each other file.
    """

    tensors: Mapping[str, _Entry]
    source_tensors: Mapping[str, str]
    files: Mapping[str, str]
    written: dict[str, str] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "HashProof":
        """Take the hashes out of a manifest.

        Raises:
            CheckpointError: if a part of it is missing.
        """
        try:
            return cls(
                tensors={
                    name: (entry["sha256"], entry["dtype"], tuple(entry["shape"]))
                    for name, entry in manifest["tensors"].items()
                },
                source_tensors=dict(manifest["source"]["tensors"]),
                files=dict(manifest["files"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"manifest.json: not a manifest of nvvl ({describe_misfit(error)})"
            ) from None

    def see(self, name: str, tensor: Tensor, source: Tensor | None) -> None:
        """Take in a written tensor, and the source's of that name if there is one."""
        self.written[name] = hash_tensor(tensor)
        if source is not None:
            self.source[name] = hash_tensor(source)

    def checks(self, view: CheckpointView) -> list[Check]:
        """State what was found, once every tensor has been seen."""
        assert view.folder is not None
        if view.source is None:
            source = not_checked(*_SOURCE, "needs the source")
        else:
            source = judge(*_SOURCE, self._source_faults(view.source))
        return [
            judge(*_WRITTEN, self._written_faults(view)),
            source,
            judge(*_FILES, self._file_faults(view.folder)),
        ]

    def _written_faults(self, view: CheckpointView) -> list[str]:
        faults = _name_faults(self.written, self.tensors)
        for name in sorted(self.written.keys() & self.tensors.keys()):
            header = view.tensors[name]
            sha256, dtype, shape = self.tensors[name]
            if (dtype, shape) != (header.dtype, header.shape):
                faults.append(
                    f"{name}: {header.dtype} {list(header.shape)}, the manifest has "
                    f"{dtype} {list(shape)}"
                )
            elif sha256 != self.written[name]:
                faults.append(f"{name}: bytes changed since it was written")
        return faults

    def _source_faults(self, source: CheckpointView) -> list[str]:
        faults = _name_faults(source.tensors, self.source_tensors)
        return faults + [
            f"{name}: not the bytes this checkpoint was made from"
            for name, sha256 in sorted(self.source.items())
            if self.source_tensors.get(name, sha256) != sha256
        ]

    def _file_faults(self, folder: Path) -> list[str]:
        found = {*find_copied_files(folder), *(name for name in _MADE if (folder / name).is_file())}
        return changed_file_faults(folder, self.files) + [
            f"{name}: not in the manifest" for name in sorted(found - self.files.keys())
        ]


def changed_file_faults(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    """Describe each file that is missing or not what it was, by name and recorded SHA-256."""
    return [
        f"{name}: bytes changed since it was written"
        if (folder / name).is_file()
        else f"{name}: missing"
        for name in changed_files(folder, recorded)
    ]


def unavailable_hashes(reason: str, *, passed: bool | None) -> list[Check]:
    """State that no hash could be compared.

    Args:
        reason: why.
        passed: None if the folder has no manifest, False if it has one that cannot be read.
    """
    return [
        Check(rule=rule, name=name, passed=passed, detail=reason)
        for rule, name in (_WRITTEN, _SOURCE, _FILES)
    ]


def _name_faults(found: Mapping[str, object], recorded: Mapping[str, object]) -> list[str]:
    return [f"{name}: in the manifest, missing" for name in sorted(recorded.keys() - found)] + [
        f"{name}: not in the manifest" for name in sorted(found.keys() - recorded)
    ]
