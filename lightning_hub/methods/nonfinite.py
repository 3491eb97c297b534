"""Detects steps whose loss or gradient is NaN or infinite; every rank takes the same decision."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hub.errors import ConfigError, HubError


class NonFiniteStepError(HubError):
    """The loss or the gradient of a step is NaN or infinite.

    Attributes:
        step: Number of the step, counted from 1.
    """

    kind = "nan"

    def __init__(self, step: int, values: Sequence[float], skipped: int = 0) -> None:
        loss, norm = values
        before = f" after {skipped} steps were skipped" if skipped else ""
        super().__init__(
            f"step {step} has loss {loss:.4g} and gradient norm {norm:.4g}{before}: the step cannot be trained on",
            remedy="look at the samples of this step in events.jsonl, and at the learning rate; "
            "model.init_args.on_nan: skip:3 would skip up to 3 such steps",
        )
        self.step = step


class NonFiniteGuard:
    """Decides whether a step is trained on, skipped, or an error, from numbers that are equal on every rank.

    On a CPU a step is checked before its update. On a GPU with ``stop``, the host does not wait for the device: a step
    is checked when the next one has been launched. This is after its update, but before anything is saved. With
    ``skip`` the host waits, because a step can only be skipped before its update.

    Args:
        on_nan: ``stop``, or ``skip:n`` to skip up to ``n`` steps.
    """

    def __init__(self, on_nan: str) -> None:
        match = re.fullmatch(r"stop|skip:([1-9]\d*)", on_nan)
        if match is None:
            raise ConfigError(
                f"{on_nan!r} is not a way to treat NaN", where="model.init_args.on_nan", remedy="use stop or skip:3"
            )
        self.limit = int(match[1] or 0)
        self.skipped = 0
        self._waiting: tuple[int, Tensor, torch.cuda.Event] | None = None

    def check(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Return whether to train on a step; false means to skip it.

        Args:
            step: Its number, counted from 1.
            loss: Its loss over all ranks.
            norm: Its gradient norm over all ranks.

        Raises:
            NonFiniteStepError: The step is not finite and may not be skipped; on a GPU also for the step before.
        """
        values = torch.stack([loss.detach().float(), norm.detach().float()])
        if values.is_cuda and not self.limit:
            self.flush()
            copy = torch.empty(2, pin_memory=True)
            copy.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._waiting = (step, copy, event)
            return True
        return self._check_values(step, values)

    def flush(self) -> None:
        """Check a step that was not checked yet."""
        if self._waiting is not None:
            (step, values, event), self._waiting = self._waiting, None
            event.synchronize()
            self._check_values(step, values)

    def _check_values(self, step: int, values: Tensor) -> bool:
        if bool(values.isfinite().all()):
            return True
        if self.skipped >= self.limit:
            raise NonFiniteStepError(step, values.tolist(), self.skipped)
        self.skipped += 1
        return False
