from __future__ import annotations

import inspect
import json
import runpy
import sys
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_hub.commands import schema
from lightning_hub.config import registry
from lightning_hub.config.bounds import Bounds
from lightning_hub.config.check import check_recipe
from lightning_hub.config.recipe import recipe_from_text
from lightning_hub.config.resolve import diff, fill_defaults
from lightning_hub.config.schema import shipped_schema
from lightning_hub.config.types import parse_type
from lightning_hub.config.yaml_reader import YamlValue
from lightning_hub.config.yaml_writer import dump
from lightning_hub.errors import ConfigError
from tests.config.test_check import GOOD

ROOT = Path(__file__).parents[2]


def test_the_shipped_catalogue_is_what_the_classes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_schema.py", "--check"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts/make_schema.py"), run_name="__main__")
    assert end.value.code == 0


def test_every_registered_name_is_in_the_catalogue() -> None:
    schema = shipped_schema()
    assert [path for path in registry.CLASSES if schema.find(path) is None] == []
    known = {f"{info.name}.{option}" for info in schema.classes for option in info.options}
    assert sorted({*registry.RANGES, *registry.TYPES, *registry.DEFAULTS} - known) == []


def test_every_default_fits_its_own_type_and_range() -> None:
    for info in shipped_schema().classes:
        for option in info.options.values():
            if option.has_default and not option.required:
                assert option.default is None or option.type.accepts(option.default), (info.name, option)
                assert Bounds(option.range).hold(option.default), (info.name, option)


def test_bounds_hold_for_methods_with_defaults_of_their_own() -> None:
    schema = shipped_schema()
    bounds: dict[str, str] = {}
    for path in registry.CLASSES:
        info = schema.find(path)
        assert info is not None
        bounds |= {f"{info.name}.{name}": option.range for name, option in info.options.items()}
    for method in ("LoRA", "OSFT"):
        own = {
            name.removeprefix("SFT."): limits for name, limits in bounds.items() if name.startswith("SFT.") and limits
        }
        assert len(own) >= 8
        assert {name: bounds[f"{method}.{name}"] for name in own} == own
    assert not Bounds(bounds["LoRA.alpha"]).hold(float("inf"))
    assert not Bounds(bounds["OSFT.lr_scale"]).hold(-1.0)


def test_the_verb_prints_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert schema.main([]) == 0
    assert {record["name"] for record in json.loads(capsys.readouterr().out)["classes"]} >= {"SFT", "Trainer"}
    with pytest.raises(ConfigError, match="no arguments are taken"):
        schema.main(["SFT"])


def test_our_options_are_documented() -> None:
    ours = [info for info in shipped_schema().classes if info.path.startswith("lightning_hub.")]
    assert {"SFT", "ChatData", "CheckpointSettings"} <= {info.name for info in ours}
    assert [f"{info.name}.{name}" for info in ours for name, option in info.options.items() if not option.help] == []


class Base:
    """A base.

    Args:
        size: How large it is.
        names: Which ones.
    """

    def __init__(self, size: int, names: list[str] | None = None) -> None: ...


class Child(Base):
    """A child with :class:`~some.place.Thing`.

    Args:
        mode: How it works.
    """

    def __init__(self, mode: Literal["a", "b"] = "a", *, share: float | Path = 0.5, **kwargs: object) -> None: ...


def test_generated_options_follow_keywords_to_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    make_schema = pytest.importorskip("make_schema")
    generator = make_schema.Generator()
    generator.add_class(Child, "model")
    assert generator.records["Child"] == {
        "name": "Child",
        "path": f"{__name__}.Child",
        "defined": f"{__name__}.Child",
        "kind": "model",
        "summary": "A child with Thing.",
        "options": [
            {"name": "mode", "type": "'a' | 'b'", "default": "a", "help": "How it works."},
            {"name": "share", "type": "float | str", "default": 0.5},
            {"name": "size", "type": "int", "required": True, "help": "How large it is.", "inherited_from": "Base"},
            {
                "name": "names",
                "type": "list[str] | null",
                "default": None,
                "help": "Which ones.",
                "inherited_from": "Base",
            },
        ],
    }


@pytest.mark.parametrize(
    ("text", "accepted", "refused"),
    [
        ("int", [1, -1], [True, 1.0, "1", None]),
        ("float", [1, 1.5], [True, "1"]),
        ("'a' | 3 | null", ["a", 3, None], ["b", 4, True]),
        ("list[int | str]", [[], [1, "a"]], [[1.5], 1]),
        ("tuple[float, float]", [[1, 2.5]], [[1], [1, 2, 3]]),
        ("map[int, float]", [{"3": 1}, {}], [{"a": 1}, {"3": "x"}]),
        ("map[str, list[bool]]", [{"3": [True]}], [{"3": [1]}]),
        ("duration", ["00:01:00:00", {"hours": 1}], ["soon", {"years": 1}, 3]),
        ("class[callback]", ["A", "a.B", {"class_path": "x"}], ["a b", 3]),
        ("callable | object", [], ["x", 1, None, {}]),
    ],
)
def test_types_accept_what_they_say(text: str, accepted: list[YamlValue], refused: list[YamlValue]) -> None:
    kind = parse_type(text)
    assert [value for value in accepted if not kind.accepts(value)] == []
    assert [value for value in refused if kind.accepts(value)] == []


@pytest.mark.parametrize("text", ["", "integer", "list[", "list[int", "int |", "tuple[int,]", "int int", "class[]"])
def test_what_is_not_a_type_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a type"):
        parse_type(text)


def test_the_full_form_is_a_recipe_that_means_the_same() -> None:
    filled = fill_defaults(recipe_from_text(GOOD, "r.yaml"))
    text = dump(filled)
    again = recipe_from_text(text, "config.yaml")
    check_recipe(again)
    assert dump(fill_defaults(again)) == text
    assert yaml.safe_load(text) == filled
    given, full = yaml.safe_load(GOOD), yaml.safe_load(text)
    assert full["model"]["init_args"].items() >= given["model"]["init_args"].items()
    assert full["model"]["class_path"] == "SFT"
    assert full["trainer"]["use_distributed_sampler"] is False
    assert full["checkpoint"]["best"] == {"metric": "val_loss", "mode": "min", "keep": 1}
    assert full["data"]["init_args"]["train"] == [{"path": "a.jsonl", "weight": 2, "split": None, "name": None}]


def test_equal_recipes_in_another_order_give_the_same_text() -> None:
    sections = [f"{part}\n" for part in GOOD.strip().split("\n") if not part.startswith(" ")]
    assert len(sections) == 5
    tree = recipe_from_text(GOOD, "r").tree
    turned = dump({key: tree[key] for key in reversed(tree)})
    assert dump(fill_defaults(recipe_from_text(turned, "r"))) == dump(fill_defaults(recipe_from_text(GOOD, "r")))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(plain, plain)
def test_a_difference_is_empty_only_between_equals_and_turns_one_into_the_other(one: YamlValue, two: YamlValue) -> None:
    changes = diff(one, two)
    assert (changes == []) == (repr(sort(one)) == repr(sort(two)))
    for change in changes:
        assert change.in_before != change.in_after or repr(change.before) != repr(change.after)


def sort(value: YamlValue) -> YamlValue:
    return {key: sort(value[key]) for key in sorted(value)} if isinstance(value, dict) else value


def test_a_difference_names_the_keys() -> None:
    changes = diff({"m": {"lr": 1e-5, "x": 1}, "l": [1]}, {"m": {"lr": 2e-5, "y": 2}, "l": [1]})
    assert [(change.path, change.before, change.after) for change in changes] == [
        ("m.lr", 1e-5, 2e-5), ("m.x", 1, None), ("m.y", None, 2),
    ]  # fmt: skip


def test_the_checks_know_no_option_that_no_class_has() -> None:
    source = inspect.getsource(__import__("lightning_hub.config.rules", fromlist=["rules"]))
    named = {
        word for word in source.replace('"', " ").split() if word.startswith(("model.init_args.", "data.init_args."))
    }
    options = {name for info in shipped_schema().classes for name in info.options}
    assert named
    assert {path.rpartition(".")[2] for path in named} <= options
