"""What is known of a model before its weights are read, and what answering leaves as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.models.generation import Messages, complete
from lightning_hub.models.pretrained import EMBEDDED_FOLDER, Pretrained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(EMBEDDED_FOLDER, tmp_path / "model")


def change(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def test_the_embedded_model_goes_by_its_name_unless_a_folder_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Pretrained("demo").path == EMBEDDED_FOLDER
    folder.rename(tmp_path / "demo")
    assert Pretrained("demo").path == Path("demo")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://example.com/model", "is a URL"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        (str(Path(__file__).parent), "has no config.json"),
    ],
)
def test_what_is_not_a_model_is_refused_before_anything_is_read(source: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Pretrained(source)


def test_everything_that_ends_an_answer_is_a_stop(folder: Path) -> None:
    eos = Pretrained(str(folder)).tokenizer.eos_token_id
    change(folder, "generation_config.json", eos_token_id=[7, eos, 9])
    assert Pretrained(str(folder)).stop_ids == (7, eos, 9)
    change(folder, "generation_config.json", eos_token_id=7)
    assert Pretrained(str(folder)).stop_ids == (7, eos)
    (folder / "generation_config.json").unlink()
    assert eos in Pretrained(str(folder)).stop_ids


@pytest.mark.parametrize(("said", "dtype"), [("bfloat16", torch.bfloat16), (None, torch.float32)])
def test_the_stored_dtype_is_that_of_the_configuration(folder: Path, said: str | None, dtype: torch.dtype) -> None:
    change(folder, "config.json", dtype=said, torch_dtype=said)
    assert Pretrained(str(folder)).stored_dtype == dtype


def test_an_adapter_has_the_configuration_of_its_base(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    change(adapter, "adapter_config.json", base_model_name_or_path=str(folder))
    opened = Pretrained(str(adapter))
    assert opened.base is not None
    assert (opened.base.name, opened.config.model_type) == (str(folder), "llama")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no base model"):
        _ = Pretrained(str(adapter)).base


def test_a_skeleton_has_the_weights_shapes_and_reads_none() -> None:
    with torch.device("meta"):
        empty = Pretrained("demo").skeleton(dtype=torch.bfloat16, attn_implementation="sdpa")
    model = loaded()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def loaded() -> PreTrainedModel:
    return Pretrained("demo").load(dtype=torch.float32, attn_implementation="eager")


PROMPTS: list[Messages] = [
    [{"role": "user", "content": "Spell kamo."}],
    [{"role": "user", "content": "Reverse the word tipalo."}],
]


def test_answers_of_a_batch_are_those_of_one_prompt_after_another() -> None:
    model, tokenizer = loaded(), Pretrained("demo").tokenizer
    together = complete(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert together == [complete(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answering_leaves_mode_attention_and_random_numbers_as_they_were(temperature: float) -> None:
    model = loaded().train()
    before, random = model.generation_config.to_dict(), torch.get_rng_state()
    complete(model, Pretrained("demo").tokenizer, PROMPTS, max_new_tokens=2, temperature=temperature)
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert model.generation_config.to_dict() == before
    assert torch.get_rng_state().equal(random)
