"""Finds the folder that a MODEL argument means, without loading torch."""

import os
import re
from pathlib import Path

import nvvl.model
from nvvl.errors import ConfigError, first_line

# Weights as pickles are never fetched. Code files are, because an output gets a copy of them for
# servers that run them; nvvl never imports or runs one.
_HUB_TEXTS = ["*.json", "*.txt", "*.jinja", "*.model", "*.py"]
_HUB_WEIGHTS = ["*.safetensors"]


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """Find the folder that a MODEL argument means.

    Args:
        model: ``embedded`` for the model shipped with the package, a folder, or a Hub id
            ``organization/name``, which is downloaded into the Hub's own cache.
        weights: Whether those of a Hub id are needed; without, only its small files are fetched.

    Raises:
        ConfigError: if it is none of these, cannot be opened, or the Hub cannot be reached.
    """
    if model == "embedded":
        folder = Path(str(nvvl.model.__file__)).parent / "embedded"
        if not (folder / "config.json").exists():
            raise ConfigError(
                f"embedded: {folder} holds no model; install a released wheel, or make the model "
                "with tools/embedded_model of the source tree"
            )
        return folder
    try:
        if model and Path(model).is_dir():
            return Path(model)
        is_there = bool(model) and os.path.lexists(model)
    except OSError as error:
        raise ConfigError(f"{model}: cannot be opened ({error.strerror})") from error
    if is_there:
        raise ConfigError(
            f"{model}: is no folder; required 'embedded', a Hub id, or the folder with config.json "
            "and the weights"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        raise ConfigError(
            f"{model}: required 'embedded', an existing folder or a Hub id organization/name"
        )
    return _download(model, _HUB_TEXTS + _HUB_WEIGHTS * weights)


def _download(hub_id: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # a connection broke
        XetDownloadError,
    )

    try:
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except (OSError, HTTPError, HFValidationError, EntryNotFoundError, XetDownloadError) as error:
        raise ConfigError(
            f"{hub_id}: no such folder, and the Hub did not give a model of that name "
            f"({first_line(error)}); check the name, log in if it is gated, or download it "
            "elsewhere and pass the folder"
        ) from error
