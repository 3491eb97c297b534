from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_hub.config.yaml_reader import YamlValue, parse_yaml, read_file
from lightning_hub.errors import ConfigError

REFUSED = {
    "duplicate": ("a: 1\nb: 2\na: 3\n", "r.yaml:3", "given twice (first on line 1)"),
    "nested duplicate": ("m:\n  x: 1\n  x: 2\n", "r.yaml:3", "'x' is given twice"),
    "tab": ("a:\n\tb: 1\n", "r.yaml:2", "tab"),
    "list": ("- a\n", "r.yaml:1", "contains a list, not a mapping"),
    "single value": ("hello\n", "r.yaml:1", "the single value 'hello'"),
    "unclosed": ("a: [1, 2\nb: 3\n", "r.yaml:2", "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "r.yaml:2", "second document"),
    "tag": ("a: !!python/object/apply:os.system [x]\n", "r.yaml:1", "not allowed"),
    "own tag": ("a:\n  b: !thing 3\n", "r.yaml:2", "not allowed"),
    "complex key": ("? [a, b]\n: 1\n", "r.yaml:1", "plain word"),
    "unknown alias": ("a: *b\n", "r.yaml:1", "alias"),
    "recursive alias": ("a: &x [*x]\n", "r.yaml:1", "alias"),
    "control character": ("a: 1\nb: \x00\n", "r.yaml:2", "control character"),
    "merge of text": ("a:\n  <<: x\n", "r.yaml:2", "<<"),
    "deep": ("a: " + "[" * 100 + "]" * 100, "r.yaml:1", "nested deeper"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_file_and_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, where, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_file("r.yaml")
    assert error.value.where == where
    assert message in error.value.message


@pytest.mark.parametrize(
    ("data", "where", "message"),
    [
        (b"a: 1\nb: \xff\xfe\n", ":2", "not UTF-8"),
        ("a: 1\n".encode("utf-16"), ":1", "UTF-16"),
        (b"a: " + b"x" * 1_000_001, "", "not a recipe"),
    ],
)
def test_refused_bytes(data: bytes, where: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as error:
        read_file(path)
    assert error.value.where == f"{path}{where}"


def test_a_folder_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_file(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_file(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file("a\0b")


def test_an_alias_bomb_costs_nothing() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    began = time.process_time()
    with pytest.raises(ConfigError, match="aliases are expanded"):
        parse_yaml("\n".join(lines), "bomb.yaml")
    assert time.process_time() - began < 0.5


def test_anchors_and_merge_keys_mean_what_yaml_says() -> None:
    text = "base: &b {x: 1, y: 2}\none: *b\ntwo:\n  <<: *b\n  y: 3\n"
    assert parse_yaml(text, "r").plain() == yaml.safe_load(text)


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbftrainer: {}\n")
    assert read_file(path)[0].plain() == {"trainer": {}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("5E6", 5e6), (".5", 0.5), ("1_000", 1000), ("-3", -3), ("0x1F", 31), ("0o17", 15), ("007", 7),
        ("yes", "yes"), ("on", "on"), ("off", "off"), ("n", "n"), ("32-true", "32-true"), ("1.2.3", "1.2.3"),
        ("00:12:00:00", "00:12:00:00"), ("2024-01-01", "2024-01-01"), ("~", None), ("true", True), ("'1'", "1"),
        (".inf", math.inf), ("1__0", "1__0"), ("9" * 5000, "9" * 5000), ("+", "+"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: YamlValue) -> None:
    read = parse_yaml(f"a: {text}", "r").plain()
    assert read == {"a": value}
    assert isinstance(read, dict)
    assert type(read["a"]) is type(value)


def test_every_key_knows_its_line_and_column() -> None:
    node = parse_yaml("a: 1\nb:\n  c:\n    - x\n    - {d: 2}\n", "r.yaml")
    places = {".".join(map(str, path)): (place.line, place.column) for path, place in node.places()}
    assert places == {
        "": (1, 1),
        "a": (1, 1),
        "b": (2, 1),
        "b.c": (3, 3),
        "b.c.0": (4, 7),
        "b.c.1": (5, 7),
        "b.c.1.d": (5, 8),
    }


@given(st.text(alphabet="ab:-[]{}#&*!|>'\"%@`, \n\t?~\\0", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):  # anything else that is raised fails the test
        parse_yaml(text, "r")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "a: [" + "1," * 120_000 + "]",
        "".join(f"k{number}: 1\n" for number in range(22_000)),
        "a: " + "[" * 240_000,
        "{" * 240_000,
        "It was so. " * 20_000,
        'a: "' + "x\n" * 110_000,
        "a: 1\n" * 300_000,
    ],
    ids=["values", "keys", "brackets", "braces", "prose", "quote", "bytes"],
)
def test_a_file_that_is_not_a_recipe_is_refused_within_seconds(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError):
        read_file(path)
    assert time.process_time() - started < 20
