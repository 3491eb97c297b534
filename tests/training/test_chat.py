from __future__ import annotations

import io
import sys

import pytest

from lightning_hub.cli import run


def test_chat_answers_line_by_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Spell kamo.\n\n/new\nReverse tipa.\n"))
    assert run(["chat", "demo"]) == 0
    assert capsys.readouterr().out.split() == ["k-a-m-o", "apit"]


def test_chat_needs_something_to_talk_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err
