"""The published scores of the 12B model, to read beside ours.

They are another model's on other benchmarks: they say how large the loss of a format can be, not
what ours should be. Numbers are as printed, without intervals, since the papers give none.

Sources: Nemotron Nano V2 VL, arXiv 2511.03929v2, Table 8 and Figure 4. Quantization-aware
distillation for NVFP4, arXiv 2601.20088v3, Tables 7 and 10, known here from a translation of the
paper only.
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
    PublishedTable(
        source="arXiv 2601.20088v3, Table 7 (learning rates of NVFP4 QAD)",
        url="https://arxiv.org/abs/2601.20088v3",
        second_hand=True,
        columns=("AI2D", "ChartQA", "DocVQA", "InfoVQA", "OCRBench", "TextVQA"),
        rows=(
            ("LR 1e-4", ("67.0", "76.0", "75.0", "47.6", "685", "70.6")),
            ("LR 2e-5", ("85.3", "87.6", "91.6", "72.2", "820", "82.8")),
            ("LR 2e-6", ("87.1", "89.7", "94.0", "78.9", "857", "84.7")),
        ),
    ),
    PublishedTable(
        source="arXiv 2511.03929v2, Figure 4 (EVS; 128 frames, RTX 6000 PRO SE)",
        url="https://arxiv.org/abs/2511.03929v2",
        second_hand=False,
        columns=("LongVideoBench", "Video-MME", "first token, ms", "tokens/s"),
        rows=(
            ("BF16, EVS off", ("63.6", "66.0", "4131", "34")),
            ("BF16, 50 %", ("63.7", "66.0", "2699", "65")),
            ("BF16, 75 %", ("62.5", "66.1", "2072", "88")),
            ("BF16, 90 %", ("60.7", "64.0", "1654", "120")),
            ("FP8, EVS off", ("64.2", "66.4", "3436", "51")),
            ("FP8, 50 %", ("63.7", "66.5", "2384", "80")),
            ("FP8, 75 %", ("62.3", "65.7", "1840", "103")),
            ("FP8, 90 %", ("60.4", "64.0", "1567", "132")),
        ),
    ),
)
