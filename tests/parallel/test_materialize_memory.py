"""What comes before and after the steps: starting without copies, refusing together, answering, exporting."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_hub.checkpoints.export import write_export
from lightning_hub.errors import ConfigError
from lightning_hub.methods.sft import SFT
from lightning_hub.models.generation import Messages
from lightning_hub.parallel.strategies import FSDP, ModelParallel
from tests.parallel.memory_probe import Samples, heaviest_moment, save_heavy_model, weighed
from tests.parallel.multiprocess import Shares, Topology, make_trainer, processes

TOPOLOGIES = {
    "one": Topology("one", 1, partial(str, "auto")),
    "fsdp": Topology("fsdp", 2, FSDP),
    "tp": Topology("tp", 2, partial(ModelParallel, ([1, 2], ["fsdp", "tp"]))),
}


def answer_and_export(name: str, folder: Path) -> list[str]:
    """Train, answer two prompts, and export from rank 0, as the end of a run does."""
    module = SFT("demo", learning_rate=1e-4)
    trainer = make_trainer(TOPOLOGIES[name], max_steps=2)
    trainer.fit(module, Shares(trainer))
    prompts: list[Messages] = [[{"role": "user", "content": f"Spell {word}."}] for word in ("bolo", "tika")]
    answers = module.predict_step(prompts, 0)
    model, weights = module.export_state()
    if trainer.is_global_zero:
        write_export(folder / "export", model, weights, module.pretrained.tokenizer)
    else:
        assert not weights
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "tp"])
def test_the_end_of_a_run_works_as_in_one_process(name: str, tmp_path: Path) -> None:
    expected = answer_and_export("one", tmp_path / "one")
    assert processes(2, partial(answer_and_export, name, tmp_path), tmp_path) == [expected, expected]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path / "export") for path in (tmp_path, tmp_path / "one"))
    assert ours.config.architectures == ["LlamaForCausalLM"]
    for (key, found), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm(), key


def refusal(model: str) -> str:
    trainer = make_trainer(Topology("fsdp", 2, FSDP))
    try:
        trainer.fit(SFT(model), Shares(trainer))
    except ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_a_model_that_rank_0_cannot_read_ends_every_rank(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    LlamaConfig(num_hidden_layers=1, hidden_size=32).save_pretrained(tmp_path / "model")
    first, second = processes(2, partial(refusal, str(tmp_path / "model")), tmp_path)
    assert first == second
    assert "cannot read the weights" in first


class Weighed(SFT):
    """Weighs this process while the model starts."""

    def configure_model(self) -> None:
        self.samples: Samples = []
        with weighed(self.samples):
            super().configure_model()


def weigh(model: str) -> Samples:
    module = Weighed(model)
    trainer = make_trainer(Topology("fsdp", 2, FSDP), limit_val_batches=1)
    trainer.validate(module, Shares(trainer), verbose=False)
    return module.samples


@pytest.mark.slow
def test_a_start_takes_little_more_than_one_model(tmp_path: Path) -> None:
    size = save_heavy_model(tmp_path / "model", layers=4)
    ranks = processes(2, partial(weigh, str(tmp_path / "model")), tmp_path)
    assert 0.9 * size <= heaviest_moment(ranks) <= 1.3 * size
