"""The page of models says what is true of the installed transformers."""

from __future__ import annotations

import re
from functools import cache

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families import BEGIN, END, PAGE, TRACEBACK, Outcome, outcome_of

ROUGH = {"gemma3n_text": 2e-2}
"""Families that amplify rounding: how far logits may be off after three steps."""

SAMPLE = [
    "llama",
    "gemma2",
    "bloom",
    "falcon",
    "qwen3_next",
    "jetmoe",
    "lfm2",
    "llama4_text",
    "roberta",
    "cpmant",
    "emu3",
]


@cache
def page() -> dict[str, str]:
    """How rows of each family are run, as the page says."""
    table = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    lines = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", table, re.MULTILINE)
    return dict(lines)


def same_version() -> bool:
    return f"transformers {transformers.__version__} -->" in PAGE.read_text(encoding="utf-8")


def faults(found: Outcome) -> list[str]:
    """Return what is wrong with a family, if anything is."""
    limits = {"losses": 1e-4, "gradients": 1e-4, "export": 0.0, "logits": ROUGH.get(found.family, 1e-3)}
    wrong = [f"{found.family}: {name} {error:.0e}" for name, error in found.errors.items() if not error <= limits[name]]
    wrong += [f"{found.family}: {found.reason}"] * (found.way == TRACEBACK)
    is_other = same_version() and found.way != page()[found.family]
    return wrong + [f"{found.family}: {found.way}, the page says {page()[found.family]}"] * is_other


def test_the_page_has_every_family() -> None:
    if not same_version():
        pytest.skip("the page was made with another transformers")
    assert list(page()) == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not [family for family, way in page().items() if way == TRACEBACK]
    assert sum(way == "not built" for way in page().values()) < 10


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_is_as_the_page_says(family: str) -> None:
    assert not faults(outcome_of(family))


@pytest.mark.long
def test_every_family_is_as_the_page_says() -> None:
    assert not [fault for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for fault in faults(outcome_of(family))]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_oss", "mistral"])
def test_attention_that_is_asked_for_by_name_is_right_too(family: str) -> None:
    found = outcome_of(family, "eager")
    assert not [fault for fault in faults(found) if "page" not in fault]
    assert found.errors
