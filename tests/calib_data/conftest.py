"""Small sets, and files of every kind a set can be built from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nvvl.calib_data.build import build_set
from nvvl.calib_data.spec import SetSpec
from nvvl.model.config import VLMConfig
from nvvl.model.processor import Processor

Build = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def processor(tiny_config: VLMConfig, tiny_tokenizer: Tokenizer) -> Processor:
    return Processor(tiny_config, tiny_tokenizer)


@pytest.fixture
def build(tmp_path: Path, processor: Processor) -> Build:
    """Return a function that builds a set of some sources in ``tmp_path / out``."""

    def run(*sources: dict[str, Any], out: str = "out", **options: Any) -> dict[str, Any]:
        values: dict[str, Any] = {"name": "test", "sources": sources}
        for key in ("max_tokens", "seed"):
            if key in options:
                values[key] = options.pop(key)
        spec = SetSpec.from_dict(values)
        given: dict[str, Any] = {"base": tmp_path, "processor": processor, "suites": {}}
        return build_set(spec, tmp_path / out, **(given | options))

    return run


@pytest.fixture
def make_pdf(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a PDF file with a page for each text; None is a blank page."""

    def write(name: str, *pages: str | None) -> Path:
        from matplotlib.backends.backend_pdf import PdfPages
        from matplotlib.figure import Figure

        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with PdfPages(path, metadata={"CreationDate": None}) as pdf:
            for text in pages:
                figure = Figure(figsize=(4, 3))
                if text is not None:
                    figure.text(0.1, 0.5, text)
                pdf.savefig(figure)
        return path

    return write
