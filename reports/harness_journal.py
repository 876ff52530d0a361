"""Responses of one model to a harness, in a file that grows by batches and is read again.

A line holds the hash of a request and its response, so a run that was killed goes on with what is
missing, and a second task reuses the requests it shares. The harness's own cache pickles.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvvl.errors import DataError, writing
from nvvl.reports.json_values import describe_fault


class ResponseJournal:
    """Responses by the hash of their request."""

    def __init__(self, path: Path) -> None:
        """Read what is there; half a line at the end, of a run that was killed, is cut off.

        Raises:
            DataError: if a complete line is not a response.
        """
        self._path = path
        self._responses: dict[str, Any] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._responses[entry["sha256"]] = entry["response"]
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}: line {number} is not a response ({describe_fault(error)}); delete "
                    "the file: what it has is asked again"
                ) from None
        if len(whole) < len(content):
            with writing(path):
                path.write_bytes(whole)

    @staticmethod
    def key(kind: str, args: Sequence[Any]) -> str:
        """Return the hash of a request: its kind, its texts and its settings."""
        text = json.dumps([kind, *args], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __contains__(self, key: str) -> bool:
        """Tell whether a request was answered."""
        return key in self._responses

    def __getitem__(self, key: str) -> Any:
        """Return the response to a request."""
        return self._responses[key]

    def add(self, keys: Sequence[str], responses: Sequence[Any]) -> None:
        """Append a batch; requests that were answered before keep their response.

        Raises:
            OutputError: if the file cannot be written.
        """
        lines = []
        for key, response in zip(keys, responses, strict=True):
            if key not in self._responses:
                self._responses[key] = response
                lines.append(json.dumps({"sha256": key, "response": response}) + "\n")
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
