"""The method that the documents show works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_hub.cli import run
from lightning_hub.errors import ConfigError
from lightning_hub.methods.causal_lm import CausalLMModule
from lightning_hub.models.pretrained import EMBEDDED_FOLDER
from tests.conftest import WriteRows

PAGE = Path(__file__).parents[2] / "docs/methods.md"


def test_the_shown_method_trains_biases_and_norms_only(
    tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "bitfit.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    # fmt: off
    assert run([
        "fit", "--run-dir", str(tmp_path / "run"), "--allow-class", "bitfit", "--model", "bitfit.BitFit",
        "--model.model", "demo", "--model.learning_rate", "1e-2", "--data", "ChatData",
        "--data.train", str(write_rows(20)), "--data.effective_batch_size", "8", "--trainer.max_steps", "2",
    ]) == 0
    # fmt: on
    before, after = (load_file(folder / "model.safetensors") for folder in (EMBEDDED_FOLDER, tmp_path / "run/export"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name].float())}
    assert changed == {name for name, tensor in after.items() if tensor.ndim == 1}


def test_a_class_that_does_not_say_what_trains_is_refused() -> None:
    module = CausalLMModule("demo")
    with pytest.raises(ConfigError, match="CausalLMModule does not say what trains"):
        module.choose_trainable(module.pretrained.skeleton(dtype=torch.float32, attn_implementation="eager"))
