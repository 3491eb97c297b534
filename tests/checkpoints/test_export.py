"""An exported folder is readable for its owner, with all files, and for no other user."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_hub.checkpoints.export import write_export
from tests.data.template_families import make_tokenizer

TEMPLATES = {"default": "{{ messages }}", "rag": "{{ messages }} with documents"}


@contextmanager
def as_unprivileged(folder: Path) -> Iterator[None]:
    """Root may open everything; become the folder's owner, who may not. Nothing to do for any other user."""
    if os.geteuid() != 0:
        yield
        return
    nobody = 65534
    for path in (folder, *folder.rglob("*")):
        os.chown(path, nobody, nobody)
    os.seteuid(nobody)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder below one that everybody may enter; the folders of pytest are for one user."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def test_an_export_with_several_templates_opens_for_its_user(open_folder: Path) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.chat_template = TEMPLATES
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    target = open_folder / "export"
    write_export(target, model, model.state_dict(), tokenizer)
    assert AutoTokenizer.from_pretrained(target).chat_template == TEMPLATES  # what is loaded late is loaded now
    modes = {path: oct(path.stat().st_mode & 0o777) for path in (target, *target.rglob("*"))}
    assert {path: mode for path, mode in modes.items() if mode != ("0o700" if path.is_dir() else "0o600")} == {}
    with as_unprivileged(open_folder):
        assert AutoTokenizer.from_pretrained(target).chat_template == TEMPLATES
