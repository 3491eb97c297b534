"""What is shown is what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_hub.data.inspection import Inspector, describe, report_lines
from lightning_hub.data.prepare import prepare
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import DataError
from tests.data.template_families import TEMPLATES, make_tokenizer
from tests.data.test_prepare import chat, write

KEYS = [
    "source",
    "format",
    "kept",
    "reason",
    "text",
    "input_ids",
    "labels",
    "trained_text",
    "num_tokens",
    "num_trained",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer((TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8"))


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    rows = [chat(0), "{", chat(1, "fox " * 99), {"messages": [{"role": "user", "content": "q"}]}, chat(2, "\x1b]0;x")]
    path = write(tmp_path / "a.jsonl", rows)
    return DataSettings(str(path), max_seq_len=60, on_long="drop", on_bad="skip")


Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture, settings: DataSettings, tokenizer: PreTrainedTokenizerFast, as_json: bool = False) -> str:
    describe(settings, tokenizer, as_json=as_json)
    return capsys.readouterr().out


@pytest.mark.parametrize("expand", [False, True])
def test_one_sample_is_the_same_as_in_the_list(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, expand: bool
) -> None:
    double = [{"messages": [*chat(n)["messages"], *chat(n + 1)["messages"]]} for n in range(4)]  # type: ignore[misc]
    first, second = write(tmp_path / "a.jsonl", double[:2]), write(tmp_path / "b.jsonl", double[2:])
    inspector = Inspector(DataSettings([str(first), str(second)], expand_turns=expand), tokenizer)
    views = inspector.views()
    assert len(views) == (8 if expand else 4)
    assert [inspector.views(sample=number + 1)[0] for number in range(len(views))] == views
    assert inspector.views(limit=3) == views[:3]
    for number in (0, len(views) + 1):
        with pytest.raises(DataError):
            inspector.views(sample=number)


@pytest.mark.security("S15")
def test_text_marks_trained_tokens_without_colour_and_shows_the_template(
    settings: DataSettings, tokenizer: PreTrainedTokenizerFast, capsys: Capture
) -> None:
    shown = printed(capsys, settings, tokenizer)
    assert "⟦<think>\\n\\n" in shown.replace("\n", "")
    assert "it is sunny 0<|im_end|>⟧" in shown
    assert "dropped: too long" in shown
    assert "\\x1b]0;x" in shown
    assert "\x1b" not in shown
    assert "{%- for message in messages %}" in shown


def test_the_report_in_words(settings: DataSettings, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    lines = "\n".join(report_lines(prepare(settings, tokenizer, cache_dir=tmp_path / "cache").report))
    assert "5 examples read, 2 kept" in lines
    assert "dropped, too long: 1" in lines
    assert "a.jsonl:2: not JSON" in lines


WIDE = "\U0001f600 \u6f22\u5b57 a\u0308 \U0001f469\u200d\U0001f469 \N{REPLACEMENT CHARACTER} end"


def test_a_character_of_several_tokens_is_shown_whole(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: Capture
) -> None:
    settings = DataSettings(str(write(tmp_path / "a.jsonl", [chat(0, WIDE)])))
    inspector = Inspector(settings, tokenizer)
    (view,) = inspector.views()
    pieces = inspector.pieces(view)
    assert "".join(text for text, _ in pieces) == view["text"]
    assert max(text.count("\N{REPLACEMENT CHARACTER}") for text, _ in pieces) == 1
    assert "".join(text for text, trained in pieces if trained) == "".join(view["trained_text"])  # type: ignore[arg-type]
    assert len(pieces) < len(view["input_ids"])  # type: ignore[arg-type]
    assert WIDE in printed(capsys, settings, tokenizer)


def test_a_character_that_is_trained_in_part_is_shown_whole(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    ids = tokenizer("a\U0001f600b", add_special_tokens=False).input_ids
    assert len(ids) > 4
    labels = [-100, -100, -100, *ids[3:]]
    settings = DataSettings(str(write(tmp_path / "a.jsonl", [{"input_ids": ids, "labels": labels}])))
    inspector = Inspector(settings, tokenizer)
    (view,) = inspector.views()
    assert (view["trained_text"], view["labels"]) == (["\U0001f600b"], labels)
    assert inspector.pieces(view) == [("a", False), ("\U0001f600", True), ("b", True)]
