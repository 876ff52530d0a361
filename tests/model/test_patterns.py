"""Regular expressions of a checkpoint: matched as Python does, refused where they cannot be."""

import pytest

from nvvl.errors import ConfigError
from nvvl.model.patterns import matches_pattern

NAME = "language_model.backbone.layers.10.mixer.in_proj"


@pytest.mark.parametrize(
    ("pattern", "begins", "is_whole"),
    [
        (r".*mixer.*", True, True),
        (r"language_model\.backbone\.layers\.1", True, False),
        (r"mixer", False, False),
        (r"language_model\.backbone\.layers\.\d+\.mixer\.(in|out)_proj", True, True),
    ],
)
def test_beginning_or_all_of_a_name(pattern: str, begins: bool, is_whole: bool) -> None:
    assert matches_pattern(pattern, NAME, whole=False) is begins
    assert matches_pattern(pattern, NAME, whole=True) is is_whole


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("(", "no regular expression"),
        (r"((?:[a-z]|[a-z_.0-9])+)*[A-Z]", "takes more than 1 s for language"),
    ],
)
def test_malformed_and_endless_ones_are_refused(pattern: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        matches_pattern(pattern, NAME, whole=True)
