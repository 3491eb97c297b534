from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_hub.methods.osft import OSFT
from lightning_hub.parallel.strategies import strategy_for
from tests.parallel.multiprocess import Shares, Topology, make_trainer


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OSFT]:
    """Return a function that trains the embedded model with OSFT in this process."""
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path))

    def fit(steps: int = 3, precision: str = "32-true", kind: type[OSFT] = OSFT, **options: object) -> OSFT:
        torch.manual_seed(0)
        module = kind(**{"model": "demo", "learning_rate": 1e-3, **options})  # type: ignore[arg-type]
        topology = Topology("one", 1, partial(strategy_for, None, 1))
        trainer = make_trainer(topology, max_steps=steps, precision=precision)
        trainer.fit(module, Shares(trainer))
        return module

    return fit
