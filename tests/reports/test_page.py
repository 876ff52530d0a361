"""The page, as a reader and as a browser gets it."""

import html
import html.parser
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

import nvvl.reports
from nvvl.errors import DataError
from nvvl.export.verify import verify
from nvvl.quantize.presets import load_recipe
from nvvl.quantize.walk import quantize_checkpoint
from nvvl.reports.curves import write_curves
from nvvl.reports.depth import measure_depth
from nvvl.reports.evaluate import Candidate, Options, evaluate
from nvvl.reports.harness import HarnessOptions, run_tasks
from nvvl.reports.harness_run import HarnessRun
from nvvl.reports.publish import Publication, publish
from nvvl.reports.suites import find_suites
from nvvl.reports.sweep import run_sweep

WIDTHS = [1280, 400]
SCHEMA = json.loads(
    (Path(nvvl.reports.__file__).parent / "report.schema.json").read_text(encoding="utf-8")
)
VOID = {"meta", "link", "img", "br", "path", "circle", "rect", "line", "polyline"}

# Shows the page in a frame of a given width, since a window of Chromium is at least 500 wide, and
# writes down what only a layout can tell.
FRAME = """<!DOCTYPE html><title>frame</title>
<iframe srcdoc="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>addEventListener("load", () => {{
  const inner = document.querySelector("iframe").contentDocument;
  const images = [...inner.images];
  document.title = "probe " + JSON.stringify({{
    width: inner.defaultView.innerWidth,
    page: inner.documentElement.scrollWidth,
    images: images.length,
    broken: images.filter(image => !image.naturalWidth).length,
  }});
}});</script>"""


class Outline(html.parser.HTMLParser):
    """The elements of a page; unbalanced tags are collected."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.unbalanced += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.unbalanced.append(f"/{tag}")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def published(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Publication:
    """Page, numbers and card of a tiny model and its proved NVFP4 weights."""
    folder = tmp_path_factory.mktemp("published")
    source = make_checkpoint(
        folder / "bf16", template="nemotron_h", vision={"preferred_resolution": [32, 32]}
    )
    out = folder / "w4"
    quantize_checkpoint(source, out, load_recipe("nvfp4-w4a16"), None, command=("nvvl", "<test>"))
    verify(out, source, logits=False).write_report(folder / "verify-w4.json")
    evaluate(
        [
            Candidate(folder=source, out=folder / "runs" / "bf16", label="BF16"),
            Candidate(folder=out, out=folder / "runs" / "w4", label="W4 <b>", pruning_rate=0.5),
        ],
        [replace(suite, max_new_tokens=8) for suite in find_suites(["line", "two_pages", "video"])]
        + find_suites(["continuation"]),
        Options(num_items=3, gate_items=2),
        teacher=source,
    )
    labels = {"BF16": source, "W4 <b>": out}
    folders = [folder / "runs" / "bf16", folder / "runs" / "w4"]
    for run, (label, checkpoint) in zip(folders, labels.items(), strict=True):
        tasks = ["nvvl_next_words", "nvvl_prose"]
        run_tasks(checkpoint, run, tasks, HarnessOptions(limit=4), label=label)
    options = Options(num_items=2, gate_items=0)
    for kind, name, values in (("evs", "video", (0.0, 0.5)), ("tiles", "page", (1, 4))):
        suites = [replace(suite, max_new_tokens=8) for suite in find_suites([name])]
        run_sweep(
            kind,  # type: ignore[arg-type]
            labels if kind == "tiles" else {"BF16": source},
            folder / "curves" / kind,
            options,
            suites=suites,
            values=values,
            num_timed=1,
            num_new_tokens=3,
        )
    measure_depth({"W4 <b>": out}, source, folder / "curves" / "evs", suites, num_items=2)
    curves = [folder / "curves" / kind for kind in ("evs", "tiles")]
    return publish(folders, folder / "report.html", sweeps=curves)


@pytest.fixture(scope="module")
def page(published: Publication) -> str:
    return published.page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.fail(
            "chromium is not installed, so no report was opened in a browser; say: make browser "
            "(as root), or: sudo apt-get install chromium"
        )
    return found


def open_in_chromium(chromium: str, page: Path, width: int, *task: str) -> tuple[str, list[str]]:
    """Return what Chromium prints and what the page wrote to the console."""
    done = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            "--disable-dev-shm-usage",  # containers have little of it
            *("--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"),
            *(f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},2400"),
            *(*task, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", WIDTHS)
def test_chromium_lays_the_page_out_within_its_width(
    chromium: str, page: str, tmp_path: Path, width: int
) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=html.escape(page), width=width), encoding="utf-8")
    dom, console = open_in_chromium(chromium, frame, 1400, "--dump-dom")
    assert console == []
    match = re.search(r"<title>probe (.*?)</title>", dom)
    assert match, "the page did not finish loading"
    found = json.loads(match[1])
    assert found["width"] == width
    assert found["page"] <= width, "something sticks out; tables scroll in their own box"
    assert found["images"] > 0
    assert found["broken"] == 0


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_chromium_draws_the_page(
    chromium: str, published: Publication, tmp_path: Path, width: int, dark: bool
) -> None:
    page = tmp_path / "report.html"
    shutil.copyfile(published.page, page)
    shot = tmp_path / "shot.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _, console = open_in_chromium(chromium, page, width, f"--screenshot={shot}", scheme)
    assert console == []
    image = Image.open(shot).convert("L")
    assert image.width == width
    pixels = np.asarray(image)
    paper = int(np.median(pixels))
    assert (paper < 64) == dark
    ink = np.abs(pixels.astype(int) - paper) > 100
    assert 0.005 < ink.mean() < 0.5
    assert ink[:800].any()
    assert ink[1600:].any()


def test_the_page_needs_nothing_else(page: str) -> None:
    outline = Outline(page)
    sources = [
        element.get("src") or "" for tag in ("img", "source") for element in outline.all(tag)
    ]
    assert sources
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert [link.get("href") for link in outline.all("link")] == ["data:,"]
    assert outline.all("script") == []
    assert "@import" not in page
    assert "url(" not in page


def test_the_page_is_well_formed_and_accessible(page: str) -> None:
    outline = Outline(page)
    assert outline.unbalanced == []
    assert outline.all("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in outline.all("img"))
    assert all(cell.get("scope") in ("row", "col", "rowgroup") for cell in outline.all("th"))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [
        name
        for _, attributes in outline.elements
        for name in (attributes.get("aria-labelledby") or "").split()
    ]
    links = [(link.get("href") or "")[1:] for link in outline.all("a")]
    assert set(named) | {link for link in links if not link.startswith("ttps")} <= set(ids)
    for svg in outline.all("svg"):
        assert svg.get("aria-hidden") == "true" or svg.get("role") == "img"


def test_the_page_shows_every_part(page: str, published: Publication) -> None:
    for part in (
        "Differences to BF16",
        "Accuracy against size",
        "language_model.backbone.layers",
        "Answers side by side",
        "nvfp4-w4a16",
        "These are the published scores of NVIDIA Nemotron Nano 12B V2 VL",
        "<strong>Second-hand:</strong>",
        "arXiv 2511.03929v2, Table 8",
        "arXiv 2511.03929v2, Figure 4",
        "continuation: perplexity",
        "Pruning video tokens (EVS)",
        "Limiting the tiles of an image",
        "50 % off",
        "4 tiles",
        "KL, this layer alone",
        "Tasks of the lm-evaluation-harness",
        "first 4 items, 0-shot, version 1.0",
        "acc_norm ↑",
        "bits_per_byte ↓",
        "gained, ",
        "on cpu (processor ",
    ):
        assert part in page
    assert page.count("data:image/webp") >= 3, "two pages and a line at least"
    quantized = published.report.runs[1]
    assert f"{quantized.weights_bytes:,} bytes" in page
    assert quantized.verified is True


def test_what_was_pruned_is_said_of_the_run_it_was_pruned_in(page: str) -> None:
    assert page.count("50 % of the tokens of videos pruned") == 1


def test_text_of_runs_is_escaped(page: str) -> None:
    assert "W4 &lt;b&gt;" in page
    assert "nvvl &lt;test&gt;" in page
    assert "<b>W4" not in page
    assert "W4 <b>" not in page


def test_json_follows_its_schema(published: Publication) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    values = json.loads(published.data.read_text(encoding="utf-8"))
    jsonschema.validate(values, SCHEMA)
    values["runs"][1]["suites"]["line"]["score"]["low"] = None
    with pytest.raises(jsonschema.ValidationError, match="None is not of type 'number'"):
        jsonschema.validate(values, SCHEMA)


def test_schema_refuses_a_key_that_it_does_not_name(published: Publication) -> None:
    values = json.loads(published.data.read_text(encoding="utf-8"))
    values["runs"][0]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate(values, SCHEMA)


def test_tasks_are_in_every_file(published: Publication) -> None:
    values = json.loads(published.data.read_text(encoding="utf-8"))
    assert [task["task"] for task in values["tasks"]] == ["nvvl_next_words", "nvvl_prose"]
    score = published.report.tasks[0].metrics[0].scores["W4 <b>"]
    assert values["tasks"][0]["metrics"][0]["scores"]["W4 <b>"]["value"] == score.value
    assert score.difference is not None
    table = published.table.read_text(encoding="utf-8")
    card = published.cards["W4 <b>"].read_text(encoding="utf-8")
    for text in (table, card):
        assert "**nvvl_next_words**: first 4 items, 0-shot, version 1.0" in text
        assert f"{score.value:.4f} ± {score.stderr:.4f} |" in text
        assert "McNemar's p" in text
    assert '          type: "nvvl_prose"\n' in card
    assert f"            value: {score.value:.4f}\n" in card


def test_tasks_alone_make_every_file(
    make_harness_run: Callable[..., HarnessRun], published: Publication, tmp_path: Path
) -> None:
    checkpoint = Path(published.report.runs[1].model)
    quantized = replace(make_harness_run("W4", {"acc": [1.0, 0.0]}), model=checkpoint)
    found = publish([make_harness_run("BF16", {"acc": [1.0, 1.0]}), quantized], tmp_path)
    page = found.page.read_text(encoding="utf-8")
    assert Outline(page).unbalanced == []
    assert "1 task of the lm-evaluation-harness 0.4.13" in page
    assert "\N{MINUS SIGN}0.5000" in page
    for part in ("Accuracy against size", "sees the image", "generated questions"):
        assert part not in page
    values = json.loads(found.data.read_text(encoding="utf-8"))
    jsonschema.validate(values, SCHEMA)
    assert (values["seed"], values["num_items"]) == (None, None)
    card = found.cards["W4"].read_text(encoding="utf-8")
    assert "| acc ↑ | 0.5000 ± 0.1250 | 0.5000 ± 0.1250 |" in card
    assert "generated" not in card


def test_cut_requests_and_what_a_sweep_left_out_are_in_every_file(
    make_harness_run: Callable[..., HarnessRun], published: Publication, tmp_path: Path
) -> None:
    checkpoint = Path(published.report.runs[1].model)
    source, cut = (make_harness_run(x, {"acc": [1.0]}, num_shortened=7) for x in ("BF16", "W4"))
    sweep = replace(published.report.sweeps[1], notes=("most tiles 6: left out",))
    write_curves(sweep, tmp_path / "sweep")
    runs = [source, replace(cut, model=checkpoint)]
    found = publish(runs, tmp_path / "report", sweeps=[tmp_path / "sweep"])
    for path in (found.page, found.table, found.cards["W4"]):
        assert "7 requests cut to --max-length 4096 (raise it)" in path.read_text("utf-8")
    assert "most tiles 6: left out." in found.page.read_text("utf-8")
    values = json.loads(found.data.read_text("utf-8"))
    jsonschema.validate(values, SCHEMA)
    assert values["tasks"][0]["num_shortened"] == {"BF16": 7, "W4": 7}
    assert values["sweeps"][0]["notes"] == ["most tiles 6: left out"]


def test_each_written_checkpoint_gets_a_card(published: Publication) -> None:
    assert list(published.cards) == ["W4 <b>"]
    card = published.cards["W4 <b>"].read_text(encoding="utf-8")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    score = published.report.runs[1].suites["line"].score
    assert f"value: {100 * score.estimate:.2f}" in front
    assert f"95 % interval {100 * score.low:.1f} to {100 * score.high:.1f}, n = 3" in front
    assert "# license:" in front, "not recorded, so not claimed"
    assert "`nvvl <test>`" in body
    assert "`nvvl verify`: passed" in body
    assert 'name = "nvfp4-w4a16"' in body


def test_text_of_runs_is_escaped_in_markdown(published: Publication) -> None:
    card = published.cards["W4 <b>"].read_text(encoding="utf-8")
    _, body = card.removeprefix("---\n").split("\n---\n", 1)
    for text in (body, published.table.read_text(encoding="utf-8")):
        assert "# " in text
        assert "W4 &lt;b>" in text
        assert "W4 <b>" not in text


def test_runs_without_bytes_of_weights_are_shown(
    make_harness_run: Callable[..., HarnessRun], published: Publication, tmp_path: Path
) -> None:
    checkpoint = Path(published.report.runs[1].model)
    runs = [
        replace(make_harness_run(label, {"acc": [1.0]}), model=model, weights_bytes=0)
        for label, model in {"BF16": Path("gone"), "W4": checkpoint}.items()
    ]
    found = publish(runs, tmp_path)
    assert '<p class="size">0.00 MB</p>' in found.page.read_text("utf-8")
    assert "model: 0.00 MB of weights." in found.cards["W4"].read_text("utf-8")


def test_card_lies_in_the_folder_of_its_label(
    make_harness_run: Callable[..., HarnessRun], tmp_path: Path
) -> None:
    for label in ("..", "a/b"):
        with pytest.raises(DataError, match="label: required a name of one line without slashes"):
            publish([make_harness_run(label, {"acc": [1.0]})], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_proof_of_another_checkpoint_is_refused(published: Publication, tmp_path: Path) -> None:
    runs = [published.page.parent / "runs" / name for name in ("bf16", "w4")]
    proof = json.loads((published.page.parent / "verify-w4.json").read_text())
    other = tmp_path / "proof.json"
    other.write_text(json.dumps({**proof, "folder": str(tmp_path)}))
    with pytest.raises(DataError, match="which no run is of"):
        publish(runs, tmp_path / "out", proofs=[other])
    other.write_text("{}")
    with pytest.raises(DataError, match="required the output of nvvl verify --json"):
        publish(runs, tmp_path / "out", proofs=[other])
