"""A recipe that has been read is read no second time: no text of it is a file or YAML once more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lightning_hub.cli import run
from lightning_hub.config.recipe import recipe_from_text
from lightning_hub.config.resolve import fill_defaults
from lightning_hub.config.schema import shipped_schema
from lightning_hub.errors import HubError
from lightning_hub.training.recipe_cli import RecipeCLI
from tests.training.conftest import Fit

OPENED: list[str] = []


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """The files that were opened; an audit hook stays for the life of the process."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            OPENED.append(arguments[0])

    sys.addaudithook(hook)
    return OPENED


class ParsedOnly(RecipeCLI):
    """Parses and makes nothing: what a class does with its options is its own."""

    def instantiate_classes(self) -> None:
        """Make nothing."""


def text_options() -> Iterator[tuple[str, str, str, bool]]:
    """Every option that takes a text, a class or settings: kind, class, option, whether a list is taken."""
    for info in shipped_schema().classes:
        for name, option in info.options.items():
            heads = {member.head for member in option.type.members()}
            if heads & {"str", "class", "settings", "choice", "list", "map"}:
                yield info.kind, info.name, name, "list" in heads


def recipe_with(kind: str, class_name: str, option: str, value: object) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "seed_everything": 1,
        "model": {"class_path": "SFT", "init_args": {"model": "demo"}},
        "data": {"class_path": "ChatData", "init_args": {"train": "rows"}},
    }
    spec = {"class_path": class_name, "init_args": {option: value}}
    if kind in ("trainer", "checkpoint"):
        tree[kind] = {option: value}
    elif kind in ("model", "data"):
        tree[kind] = {"class_path": class_name, "init_args": {**tree[kind]["init_args"], option: value}}
    elif kind == "strategy":
        tree["trainer"] = {"strategy": spec}
    elif kind in ("callback", "logger"):
        tree["trainer"] = {"callbacks" if kind == "callback" else "logger": [spec]}
    elif class_name == "Source":
        tree["data"]["init_args"]["train"] = [{"path": "rows", option: value}]
    elif class_name == "Best":
        tree["checkpoint"] = {"best": {"monitor": "val_loss", option: value}}
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simple.csv", "/absolute"])
def test_no_option_of_any_class_opens_a_file(
    name: str, opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name.lstrip("/")
    path.write_text("class_path: LoRA\ninit_args: {model: other}\n")
    monkeypatch.chdir(tmp_path)
    value = str(path) if name.startswith("/") else name
    for kind, class_name, option, takes_list in text_options():
        values: list[object] = [value, {"class_path": value}]
        for given in values + [[value]] * takes_list:
            del opened[:]
            with suppress(HubError):
                ParsedOnly(recipe_with(kind, class_name, option, given))
            touched = [file for file in opened if Path(tmp_path, file) == path]
            assert not touched, f"{class_name}.{option}"


@pytest.mark.slow
def test_texts_reach_their_options_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = ["2024", "[a]*.jsonl", "{x: y}", "- a", "null", "true", "a: b", "1e3", "~", "!!int 3", "&a b"]
    for text in odd:
        Path(text).write_text("something else")
        tree = recipe_with("data", "ChatData", "train", text)
        tree["data"]["init_args"] |= {"predict": text, "columns": {"prompt": text}}
        tree["model"]["init_args"]["model"] = text
        data = ParsedOnly(tree).config["data"]["init_args"]
        assert (data["train"], data["predict"], data["columns"]) == (text, text, {"prompt": text})
        assert type(data["train"]) is type(data["columns"]["prompt"]) is str
        tree["data"]["init_args"]["train"] = [text]
        assert ParsedOnly(tree).config["data"]["init_args"]["train"] == [text]
        tree["data"]["init_args"]["train"] = [{"path": text, "split": text}]
        (source,) = ParsedOnly(tree).config["data"]["init_args"]["train"]
        assert (source["path"], source["split"]) == (text, text)


def test_a_class_is_never_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("simple.csv").write_text("class_path: lightning.pytorch.callbacks.Timer\n")
    tree = fill_defaults(recipe_from_text(
        "trainer: {callbacks: [simple.csv]}\nmodel: {class_path: SFT, init_args: {model: demo}}\n"
        "data: {class_path: ChatData, init_args: {train: a}}", "recipe",
    ))  # fmt: skip
    with pytest.raises(HubError, match=r"simple"):
        ParsedOnly(tree)


CONTENTS = {
    "words.csv": b"word\nfox\ndog\n",
    "points-elsewhere.txt": b"elsewhere.jsonl",
    "prose.txt": b"It was so: that is, {if} anybody asked\n\t- nobody did.\n" * 400,
    "brackets.txt": b"[" * 30_000,
    "braces.txt": b"{" * 30_000,
    "recipe.txt": b"class_path: subprocess.Popen\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("position", ["train", "val", "list", "sources", "recipe"])
def test_a_file_of_data_is_read_as_data(
    name: str, position: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(CONTENTS[name])
    Path("elsewhere.jsonl").write_text('{"text": "SECRET"}\n')
    Path("good.jsonl").write_text('{"text": "the fox"}\n')
    words = ["--model", "SFT", "--model.model", "demo", "--data", "ChatData", "--data.on_bad", "skip"]
    words += ["--data.on_long", "truncate", "--data.columns", "{text: word}"] if name == "words.csv" else []
    if position == "recipe":
        Path("r.yaml").write_text(f"data: {{class_path: ChatData, init_args: {{train: [{name}, good.jsonl]}}}}\n")
        words += ["--config", "r.yaml"]
    elif position == "val":
        words += ["--data.train", "good.jsonl", "--data.val", name]
    else:
        form = {"train": name, "list": f"[{name}, good.jsonl]", "sources": f"[{{path: {name}, weight: 2}}]"}
        words += ["--data.train", form[position]]
    code = run(["data", *words, "--limit", "1"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert name in shown.out
    assert "SECRET" not in shown.out
    assert "elsewhere.jsonl" not in shown.out.replace("⟦", "").replace("trained", "") or name.startswith("points")


def test_prompts_are_no_recipe(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("[" * 30_000)
    words = ["--model", "SFT", "--model.model", "demo", "--data", "ChatData", "--data.train", "x.jsonl"]
    assert run(["predict", *words, "--data.predict", str(prompts)]) == 2
    assert f"{prompts}:1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--data.train", "--model.model", "--trainer.callbacks", "--trainer.strategy"])
@pytest.mark.parametrize("text", ["[" * 30_000, '"' + "[" * 30_000 + '"', "{" * 30_000])
def test_brackets_on_the_command_line_end_nothing(
    fit: Fit, flag: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = fit(flag, text)
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err
