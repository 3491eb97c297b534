"""What the ranks exchange in a step of OSFT is what they exchange in a step of SFT."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from lightning_hub.methods.osft import OSFT
from lightning_hub.methods.sft import SFT
from tests.parallel.multiprocess import Shares, calm, make_trainer, processes
from tests.parallel.resume_cases import TOPOLOGIES

FORMS: dict[str, dict[str, Any]] = {
    "full, merged": {"forward": "merged"},
    "full, factored": {"forward": "factored"},
    "thin, merged": {"complement": "thin", "forward": "merged"},
    "thin, factored": {"complement": "thin", "forward": "factored"},
}


class Listening(Callback):
    """Counts the messages of the third step, by kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._profile: profile | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, index: int) -> None:
        if index == 2:
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: object, index: int
    ) -> None:
        if self._profile is not None:
            self._profile.stop()
            names = [event.name for event in self._profile.events() or ()]
            self.counts.update(name for name in names if name.startswith("gloo:"))
            self._profile = None


def listen(model: str) -> dict[tuple[str, str], Counter[str]]:
    """Train as one of two ranks, by SFT and by every form, and return what each has exchanged in a step."""
    found = {}
    for topology, (name, options) in product(("ddp", "fsdp"), {"sft": None, **FORMS}.items()):
        torch.manual_seed(0)
        module = SFT(model) if options is None else OSFT(model, **options)
        heard = Listening()
        trainer = make_trainer(TOPOLOGIES[topology], max_steps=4, callbacks=[heard], gradient_clip_val=1.0)
        trainer.fit(module, Shares(trainer))
        found[topology, name] = heard.counts
    return found


@pytest.mark.slow
def test_no_form_adds_a_message_to_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path / "cache"))
    for counts in processes(2, partial(listen, calm()), tmp_path):
        assert len(counts) == 2 * (1 + len(FORMS))
        for (topology, name), found in counts.items():
            expected = counts[topology, "sft"]
            assert sum(expected.values()) > 1
            assert all(found[kind] <= expected[kind] for kind in found), (topology, name, found, expected)
