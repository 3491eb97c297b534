"""Generates answers to fixed prompts during a training, to see what the model learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedTokenizerBase

from lightning_hub.config.bounds import Bounds
from lightning_hub.models.generation import Messages


class CanGenerate(Protocol):
    """A module that can generate answers to prompts."""

    def generate(
        self,
        prompts: Sequence[Messages],
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
    ) -> list[str]:
        """Return the answers, in order."""


class GenerateSamples(Callback):
    """Generates answers to prompts at regular steps, and writes them to ``samples.jsonl`` of the run.

    Args:
        prompts: The prompts, each as one user turn.
        every_n_steps: Steps between two rounds of answers; there is also one after the last step.
        max_new_tokens: The largest length of an answer, in tokens.
        temperature: 0 always takes the most likely token; above 0 tokens are sampled.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: Annotated[int, Bounds(">= 1")] = 100,
        max_new_tokens: Annotated[int, Bounds(">= 1")] = 128,
        temperature: Annotated[float, Bounds(">= 0")] = 0.0,
    ) -> None:
        self.prompts = prompts
        self.every_n_steps = every_n_steps
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.write: Callable[[int, str, str], None] = lambda step, prompt, completion: None
        self._last_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Generate answers if this step is due."""
        if trainer.global_step % self.every_n_steps == 0:
            self._generate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate answers after the last step."""
        self._generate(trainer, pl_module)

    def _generate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        turns = [[{"role": "user", "content": prompt}] for prompt in self.prompts]
        answers = cast("CanGenerate", pl_module).generate(
            turns,
            trainer.datamodule.tokenizer,  # type: ignore[attr-defined]  # Lightning types its trainer without one
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )
        if trainer.is_global_zero:
            for prompt, answer in zip(self.prompts, answers, strict=True):
                self.write(trainer.global_step, prompt, answer)
