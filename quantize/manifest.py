"""What a written checkpoint was made from, and a hash of everything in it.

``manifest.json`` holds no time and no host name, so that the same command on the same inputs gives
the same bytes; comparing two manifests then says what differs.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nvvl
from nvvl.errors import CheckpointError, describe_misfit, writing
from nvvl.model.hashing import hash_file
from nvvl.staging import MANIFEST_NAME

_VERSIONED = ("torch", "nvidia-modelopt", "transformers", "safetensors")


@dataclass(frozen=True)
class TensorRecord:
    """Hash, safetensors dtype and shape of one written tensor."""

    sha256: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of one quantized checkpoint.

    Attributes:
        format: Name of the recipe.
        command: The command line, for the reader.
        source: SHA-256 of each tensor of the BF16 source, by name.
        tensors: What was written, by name.
        files: SHA-256 of every other file of the folder, by name.
        items: (id, SHA-256) of each calibration item, in the order they were used.
        versions: Of Python and of the libraries that the bytes could depend on.
        distillation: How the source's weights were trained; empty if they were not.
    """

    format: str
    command: Sequence[str]
    source: Mapping[str, str]
    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, str]
    items: Sequence[tuple[str, str]]
    versions: Mapping[str, str]
    nvvl_version: str = nvvl.__version__
    distillation: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``manifest.json``."""
        values: dict[str, Any] = {
            "nvvl_version": self.nvvl_version,
            "versions": dict(sorted(self.versions.items())),
            "command": list(self.command),
            "format": self.format,
            "calibration": {
                "items": [{"id": item_id, "sha256": sha256} for item_id, sha256 in self.items]
            },
            "files": dict(sorted(self.files.items())),
            "source": {"tensors": dict(sorted(self.source.items()))},
            "tensors": {
                name: {"sha256": r.sha256, "dtype": r.dtype, "shape": list(r.shape)}
                for name, r in sorted(self.tensors.items())
            },
        }
        if self.distillation:
            values["distillation"] = dict(self.distillation)
        return values

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into a folder.

        Raises:
            OutputError: if it cannot be written.
        """
        write_json(folder / MANIFEST_NAME, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read ``manifest.json`` of a folder.

        Raises:
            CheckpointError: if it is missing or not a manifest.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                nvvl_version=values["nvvl_version"],
                versions=values["versions"],
                command=values["command"],
                format=values["format"],
                items=[(item["id"], item["sha256"]) for item in values["calibration"]["items"]],
                files=values["files"],
                source=values["source"]["tensors"],
                tensors={
                    name: TensorRecord(entry["sha256"], entry["dtype"], tuple(entry["shape"]))
                    for name, entry in values["tensors"].items()
                },
                distillation=values.get("distillation", {}),
            )
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}); required a folder that nvvl wrote"
            ) from None
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: not a manifest of nvvl ({describe_misfit(error)})"
            ) from None


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that written bytes could depend on."""
    return {name: version(name) for name in _VERSIONED} | {"python": platform.python_version()}


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder, but for the manifest and the weight shards.

    Shards are covered tensor by tensor, which can be hashed while they are written.
    """
    return {
        path.name: hash_file(path)
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_NAME and not fnmatchcase(path.name, "model*.safetensors")
    }


def encode_json(values: Mapping[str, Any]) -> bytes:
    """Return the bytes that `write_json` writes.

    What of a file name is no UTF-8, a lone surrogate in Python, is escaped as JSON does it.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write readable JSON with a final newline.

    Raises:
        OutputError: if the file cannot be written.
    """
    with writing(path):
        path.write_bytes(encode_json(values))
