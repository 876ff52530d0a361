from collections import Counter

import pytest

from nvvl.calib_data.documents import KINDS
from nvvl.calib_data.items import item_hash
from nvvl.calib_data.listing import MIXTURE
from nvvl.calib_data.values import load_list
from nvvl.errors import DataError
from nvvl.reports.metrics import METRICS
from nvvl.reports.suites import DEFAULT_SUITES, SUITES, find_suites
from nvvl.tools.embedded_model.stages import GROUPS


@pytest.mark.parametrize("name", sorted(SUITES))
def test_every_suite_asks_one_question_with_a_perfect_truth(name: str) -> None:
    suite = SUITES[name]
    for item in suite.items(4, seed=3):
        question, answer = item.messages
        assert (question.role, answer.role) == ("user", "assistant")
        assert question.content.count("<image>") == len(item.images)
        assert question.content.count("<video>") == len(item.videos)
        if suite.max_new_tokens:
            assert item.images or item.videos
            assert METRICS[suite.metric](answer.content, answer.content) == 1.0
            assert len(answer.content) <= suite.max_new_tokens


def test_every_suite_has_a_thousand_items() -> None:
    for suite in SUITES.values():
        assert suite.num_available is None or suite.num_available >= 1000


def test_each_held_out_word_is_predicted_once() -> None:
    suite = SUITES["continuation"]
    assert suite.num_available is not None
    items = list(suite.items(suite.num_available, seed=4))
    targets = [item.messages[1].content for item in items]
    prose = " ".join(load_list("prose_held_out.txt")).split()
    assert Counter(" ".join(targets).split()) <= Counter(prose)
    assert sum(len(target.split()) for target in targets) == 9 * suite.num_available
    for item in items[:20]:
        context = item.messages[0].content.removeprefix("Continue the text.\n")
        assert f"{context} {item.messages[1].content}" in " ".join(prose)
    again = {item.messages[1].content for item in suite.items(suite.num_available, seed=5)}
    assert again == set(targets)
    with pytest.raises(DataError, match="has 1054 items, asked for number 1054"):
        suite.make_item(1054, 0)


@pytest.mark.parametrize("name", DEFAULT_SUITES)
def test_items_depend_on_number_and_seed_alone(name: str) -> None:
    suite = SUITES[name]
    first = [item_hash(item) for item in suite.items(6, seed=0)]
    assert item_hash(suite.make_item(5, 0)) == first[5]
    assert len(set(first)) == 6
    assert not set(first) & {item_hash(item) for item in suite.items(6, seed=1)}


def test_item_ids_name_suite_seed_and_number() -> None:
    assert SUITES["line"].make_item(17, 2).item_id == "line-2-17"


@pytest.mark.parametrize("name", ["line", "key_value", "page", "video"])
def test_unseen_fonts_change_the_pixels_and_not_the_suite(name: str) -> None:
    seen, unseen = SUITES[name], SUITES[f"{name}_unseen_fonts"]
    assert (seen.metric, seen.max_new_tokens) == (unseen.metric, unseen.max_new_tokens)
    assert item_hash(seen.make_item(0, 0)) != item_hash(unseen.make_item(0, 0))


def test_held_out_layouts_are_in_no_training_document() -> None:
    trained = {kind for kinds, _, _ in GROUPS.values() for kind in kinds}
    unseen = {kind for kind in KINDS if kind in SUITES and kind not in {*trained, *MIXTURE}}
    assert unseen == {"line_chart", "pie_chart"}
    asked = [item for kind in sorted(unseen) for item in SUITES[kind].items(40)]
    assert {item.domain for item in asked} == unseen
    # layout is what differs from training, so the fonts are those of training
    assert not {f"{kind}_unseen_fonts" for kind in unseen} & set(SUITES)
    questions = {item.messages[0].content.removeprefix("<image>\n").split(" ")[1] for item in asked}
    assert questions == {"is", "line", "point", "slice"}


def test_key_value_asks_for_values_and_text_for_everything() -> None:
    for item in SUITES["key_value"].items(20):
        assert "What is the " in item.messages[0].content
        assert "\n" not in item.messages[1].content
    for item in SUITES["text"].items(5):
        assert "Transcribe" in item.messages[0].content


def test_suites_are_found_in_the_order_asked() -> None:
    assert [suite.name for suite in find_suites(["table", "line"])] == ["table", "line"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["line", "lines"], "suites: lines unknown; required any of line, line_unseen"),
        (["line", "line"], "each may be given once"),
    ],
)
def test_unknown_and_repeated_suites_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_suites(names)
