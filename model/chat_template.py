"""What a checkpoint's own chat template says that `nvvl.model.prompt` does not know: a BOS token.

Templates are looked at and never run. The text of turns is `nvvl.model.prompt`'s.
"""

import json
import re
from pathlib import Path
from typing import Any

from nvvl.errors import ConfigError

_BEGINS_WITH_BOS = re.compile(r"\{\{-?\s*bos_token\b")


def read_bos(folder: Path) -> str:
    """Return the text of the BOS token if the folder's chat template writes it, else nothing.

    Args:
        folder: Of a checkpoint; ``chat_template.jinja`` comes before ``tokenizer_config.json``.

    Raises:
        ConfigError: if the template writes one that no file names, or a file cannot be read.
    """
    config = _read_tokenizer_config(folder / "tokenizer_config.json")
    template = _read_template(folder / "chat_template.jinja", config)
    if not _BEGINS_WITH_BOS.search(template):
        return ""
    token = config.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str) or not token:
        raise ConfigError(
            f"{folder}: the chat template begins with bos_token, which tokenizer_config.json does "
            "not name; copy that file from the source checkpoint"
        )
    return token


def _read_template(path: Path, config: dict[str, Any]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        found = config.get("chat_template") or ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if isinstance(found, list):  # several, by name
        found = next((entry["template"] for entry in found if entry["name"] == "default"), "")
    return str(found)


def _read_tokenizer_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: required a JSON object, got {type(values).__name__}")
    return values
