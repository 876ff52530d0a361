"""The published scores of the 12B model, to read beside ours.

They are another model's on other benchmarks: they say how large the loss of a format can be, not
what ours should be. Numbers are as printed, without intervals, since the papers give none.

Sources: Nemotron Nano V2 VL, arXiv 2511.03929v2, Table 8. Quantization-aware distillation for
NVFP4, arXiv 2601.20088v3, Table 10, known here from a translation of the paper only.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A table of a paper.

    Attributes:
        source: paper and table.
        url: of the paper.
        second_hand: whether the paper itself was not read.
        columns: names of the benchmarks.
        rows: name of the precision, then its scores as printed.
    """

    source: str
    url: str
    second_hand: bool
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


PUBLISHED_TABLES = (
    PublishedTable(
        source="arXiv 2511.03929v2, Table 8",
        url="https://arxiv.org/abs/2511.03929v2",
        second_hand=False,
        columns=("AI2D", "ChartQA", "OCRBench", "DocVQA-val", "OCRBenchV2-EN"),
        rows=(
            ("BF16", ("87.21", "89.68", "854", "94.22", "61.74")),
            ("FP8-PTQ", ("87.56", "89.44", "854", "94.32", "61.83")),
            ("NVFP4-PTQ", ("86.37", "88.84", "863", "92.38", "60.88")),
            ("NVFP4-QAD", ("87.14", "89.96", "851", "93.95", "61.94")),
        ),
    ),
    PublishedTable(
        source="arXiv 2601.20088v3, Table 10",
        url="https://arxiv.org/abs/2601.20088v3",
        second_hand=True,
        columns=("AI2D", "ChartQA", "DocVQA", "InfoVQA", "OCRBench", "TextVQA"),
        rows=(
            ("BF16", ("87.3", "89.7", "94.3", "79.3", "855", "85.2")),
            ("NVFP4 PTQ (max)", ("86.8", "89.6", "93.8", "78.2", "850", "84.8")),
            ("NVFP4 QAT", ("86.5", "89.8", "93.7", "78.3", "848", "84.8")),
            ("NVFP4 QAD", ("86.7", "89.4", "93.9", "78.4", "858", "85.2")),
        ),
    ),
)
