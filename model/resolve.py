"""Finds the folder that a MODEL argument means, without loading torch."""

import re
from pathlib import Path

import nvvl.model
from nvvl.errors import ConfigError

# Data and text only: weights as pickles and Python code are never fetched.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def resolve_model(model: str) -> Path:
    """Find the folder that a MODEL argument means.

    Args:
        model: ``embedded`` for the model shipped with the package, a folder, or a Hub id
            ``organization/name``, which is downloaded into the Hub's own cache.

    Raises:
        ConfigError: if it is none of these, or the Hub cannot be reached.
    """
    if model == "embedded":
        folder = Path(str(nvvl.model.__file__)).parent / "embedded"
        if not (folder / "config.json").exists():
            raise ConfigError(
                f"embedded: {folder} holds no model; install a released wheel, or make the model "
                "with tools/embedded_model of the source tree"
            )
        return folder
    if model and Path(model).is_dir():
        return Path(model)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        raise ConfigError(
            f"{model}: required 'embedded', an existing folder or a Hub id organization/name"
        )
    return _download(model)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        HTTPError,  # type: ignore[attr-defined]  # of its HTTP library: a connection broke
        XetDownloadError,
    )

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (OSError, HTTPError, HFValidationError, EntryNotFoundError, XetDownloadError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{hub_id}: no such folder, and the Hub did not give a model of that name ({reason}); "
            "check the name, log in if it is gated, or download it elsewhere and pass the folder"
        ) from error
