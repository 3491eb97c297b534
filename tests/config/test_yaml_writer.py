from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_hub.config.yaml_reader import YamlValue, parse_yaml
from lightning_hub.config.yaml_writer import dump, edit

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "on",
        "No",
        "y",
        "null",
        "~",
        "1e5",
        "1:30",
        "0o7",
        "- a",
        "a: b",
        "#x",
        " a",
        "a ",
        "=",
        "<<",
        "2024-01-01",
        ".inf",
    ]
)
scalars = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | texts
trees: st.SearchStrategy[YamlValue] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


@pytest.mark.slow
@given(st.dictionaries(texts.filter(lambda key: key != "<<"), trees, max_size=4))
def test_what_is_written_is_read_back_by_us_and_by_a_yaml_1_1_parser(tree: dict[str, YamlValue]) -> None:
    text = dump(tree)
    assert repr(parse_yaml(text, "r").plain()) == repr(yaml.safe_load(text)) == repr(tree)


def test_floats_keep_every_digit_and_look_like_floats() -> None:
    assert (
        dump({"a": 1e-5, "b": 0.1 + 0.2, "c": 1e22, "d": 3.0})
        == "a: 1.0e-05\nb: 0.30000000000000004\nc: 1.0e+22\nd: 3.0\n"
    )


def test_editing_keeps_comments_quotes_and_order() -> None:
    text = """\
# mine
trainer:   {max_epochs: 3}  # three
model:
  class_path: 'SFT'
  # rate
  init_args:
    learning_rate: 1e-5  # small
"""
    edited = edit(text, {("model", "init_args", "learning_rate"): 2e-5, ("checkpoint", "keep"): 3})
    for kept in ("# mine", "# three", "'SFT'", "# rate", "# small"):
        assert kept in edited
    tree = parse_yaml(edited, "r").plain()
    assert tree == {
        "trainer": {"max_epochs": 3},
        "model": {"class_path": "SFT", "init_args": {"learning_rate": 2e-5}},
        "checkpoint": {"keep": 3},
    }


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_editing_changes_one_value_only(value: float) -> None:
    text = "a: 1.10  # x\nb: {c: 1e-5, d: [1, 2]}\n"
    tree = parse_yaml(edit(text, {("b", "c"): value}), "r").plain()
    assert tree == {"a": 1.1, "b": {"c": value, "d": [1, 2]}}
