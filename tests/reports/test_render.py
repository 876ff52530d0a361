import io
import json
from dataclasses import replace

from rich.console import Console

from nvvl.reports.collect import Difference, ImageGate, Report, RunScore, SuiteScore
from nvvl.reports.compare import Interval
from nvvl.reports.render import make_rows, make_table, render_json, render_markdown


def make_interval(estimate: float, half: float, n: int = 1000) -> Interval:
    return Interval(estimate, estimate - half, estimate + half, n)


def make_score(difference: Difference | None, kl: Interval | None) -> SuiteScore:
    return SuiteScore(
        metric="exact_match",
        score=make_interval(0.9412, 0.0154),
        exact_match=make_interval(0.9412, 0.0154),
        cer=make_interval(0.01, 0.001),
        anls=make_interval(0.01, 0.001),
        perplexity=make_interval(0.01, 0.001),
        visual_tokens=64.0,
        kl=kl,
        top1=None,
        difference=difference,
    )


def make_run(label: str, *, difference: Difference | None, verified: bool | None) -> RunScore:
    kl = None if difference is None else make_interval(0.00461, 0.0004)
    return RunScore(
        label=label,
        format=label,
        model=f"models/{label}",
        out=f"runs/{label}",
        model_sha256="0123456789abcdef" * 4,
        dtype="bfloat16",
        weights_bytes=13_345_678,
        folder_bytes=14_000_000,
        verified=verified,
        suites={"key_value": make_score(difference, kl)},
        kl=kl,
        top1=None if kl is None else make_interval(0.991, 0.002),
        gate=ImageGate(
            suite="key_value",
            right=make_interval(0.95, 0.03),
            blank=make_interval(0.01, 0.01),
            other=make_interval(0.0, 0.0),
            p_blank=1e-30,
            p_other=1e-30,
            passed=verified is not False,
        ),
    )


REPORT = Report(
    nvvl_version="0.1.0",
    baseline="BF16",
    seed=0,
    num_items=1000,
    runs=(
        make_run("BF16", difference=None, verified=None),
        make_run(
            "NVFP4",
            difference=Difference(
                score=make_interval(-0.0072, 0.0051),
                num_gained=3,
                num_lost=10,
                p_value=0.09,
                recovery_percent=99.2,
            ),
            verified=True,
        ),
        make_run(
            "broken",
            difference=Difference(
                score=Interval(0.0, 0.0, 0.0, 1000),
                num_gained=0,
                num_lost=0,
                p_value=1.0,
                recovery_percent=100.0,
            ),
            verified=False,
        ),
    ),
)


def test_rows_give_every_number_its_interval() -> None:
    rows = {row.name: row.cells for row in make_rows(REPORT)}
    assert rows == {
        "weights, MB": ("13.35", "13.35", "13.35"),
        "weights, bytes": ("13,345,678",) * 3,
        "key value: exact match, %": ("94.1 [92.6, 95.7]",) * 3,
        "- minus BF16": ("-", "-0.7 [-1.2, -0.2]", "0.0 [0.0, 0.0]"),
        "KL to teacher, nats": ("-", "0.0046 [0.0042, 0.005]", "0.0046 [0.0042, 0.005]"),
        "top-1 agreement, %": ("-", "99.1 [98.9, 99.3]", "99.1 [98.9, 99.3]"),
        "sees the image": ("yes (95.0 / 1.0 / 0.0)",) * 2 + ("NO (95.0 / 1.0 / 0.0)",),
        "verified": ("-", "yes", "NO"),
    }


def test_markdown_holds_the_rows_and_where_they_come_from() -> None:
    page = render_markdown(REPORT)
    assert "1,000 items a suite, seed 0" in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(make_rows(REPORT))
    assert {line.count("|") for line in table} == {5}
    for run in REPORT.runs:
        assert f"answers in {run.out}" in page
        assert run.model in page


def test_a_label_cannot_break_the_markdown_table() -> None:
    row = make_run("a|b", difference=None, verified=None)
    page = render_markdown(
        Report(nvvl_version="0", baseline="a|b", seed=0, num_items=1, runs=(row,))
    )
    assert r"|  | a\|b |" in page


def test_text_of_files_makes_no_line_or_tag_of_its_own() -> None:
    row = make_run("<i>a", difference=None, verified=None)
    row = replace(row, model="m\n# forged", format="<script>", dtype="x\n\n| a | b |")
    report = Report(
        nvvl_version="0", baseline="<i>a", seed=0, num_items=1, runs=(row,), differing=("<b>\n# c",)
    )
    page = render_markdown(report)
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        *("# &lt;i>a", "## Runs", "## How to read this"),
    ]
    assert "**&lt;i>a**: m # forged (&lt;script>, computed in x  | a | b |, " in page
    assert "in the same way: &lt;b> # c. " in page
    assert "- minus &lt;i>a |" in page


def test_three_runs_fit_a_terminal_of_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(make_table(REPORT))
    text = console.export_text()
    assert "94.1 [92.6, 95.7]" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_json_holds_the_unrounded_numbers() -> None:
    values = json.loads(render_json(REPORT))
    assert values["runs"][1]["suites"]["key_value"]["score"]["estimate"] == 0.9412
    assert values["runs"][1]["suites"]["key_value"]["difference"]["num_lost"] == 10
    assert values["runs"][0]["kl"] is None
