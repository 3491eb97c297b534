"""What a person types on the first day: names, short forms, and words of other tools."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_hub.cli import run
from lightning_hub.config.shipped import recipe_path, shipped_recipes
from lightning_hub.errors import ConfigError
from lightning_hub.launch.options import parse
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import read_metrics
from tests.conftest import WriteRows


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, object]]:
    assert run(["fit", *words, "--print_config"]) == 0
    loaded: dict[str, dict[str, object]] = yaml.safe_load(capsys.readouterr().out)
    return loaded


def test_short_forms_mean_the_long_ones(capsys: pytest.CaptureFixture[str]) -> None:
    long = ["--config", "configs/sft.yaml", "--model.learning_rate", "1e-4", "--trainer.max_steps", "10"]
    expected = printed(capsys, *long)
    overrides = ["model.learning_rate=1e-4", "trainer.max_steps=10"]
    assert printed(capsys, "configs/sft.yaml", *overrides) == expected
    assert printed(capsys, "--config", "sft", *overrides) == expected
    assert printed(capsys, "sft", *overrides) == expected
    assert printed(capsys, "--config=sft", "--trainer.max_steps=10", "--model.learning_rate=1e-4") == expected


@pytest.mark.parametrize("value", ["lora", "other.yaml", "model.r=3"])
def test_the_value_of_a_flag_is_no_recipe(value: str) -> None:
    command, options, given = parse("predict", ["sft", "--run-name", value, "--to", value], ["--to"])
    assert [source.name for source in command.recipe.sources] == [recipe_path("sft")]
    assert (options.run_name, given.to) == (value, value)


def test_shipped_recipes_go_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"sft", "lora", "osft", "strategy/fsdp"} <= shipped_recipes().keys()
    monkeypatch.chdir(tmp_path)
    assert recipe_path("fsdp") == str(shipped_recipes()["strategy/fsdp"])
    (tmp_path / "sft").write_text("trainer: {}")
    assert recipe_path("sft") == "sft", "a file of this name is what the person means"
    with pytest.raises(ConfigError, match="did you mean lora"):
        recipe_path("lorra")


def test_a_logger_goes_by_what_people_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--config", "sft", "--logger", "wandb") == printed(
        capsys, "--config", "sft", "--trainer.logger", "WandbLogger"
    )


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["train"], "did you mean fit?"),
        (["finetune"], "did you mean fit?"),
        (["sft"], "did you mean fit sft?"),
        (["evaluate"], "did you mean validate?"),
        (["runs", "lst"], "did you mean runs list?"),
        (["runs", "ls"], "did you mean runs list?"),
        (["fit", "sfft"], "did you mean sft?"),
        (["fit", "--config", "sfft"], "did you mean sft?"),
        (["fit", "--config", "sft", "--seed", "3"], "did you mean --seed_everything?"),
        (["fit", "--config", "sft", "--output_dir", "x"], "did you mean --run-dir?"),
        (["fit", "--config", "sft", "--resume_from_checkpoint", "x"], "did you mean --resume?"),
        (["fit", "--config", "sft", "lr=3"], "did you mean model.learning_rate?"),
        (["fit", "--config", "sft", "modle.r=3"], "did you mean --model.r?"),
        (["fit", "--config", "sft", "model.mesh_shape=[2,2]"], "trainer.strategy: {class_path: ModelParallel"),
        (["export", "demo"], "demo is the name of the embedded model"),
    ],
    ids=" ".join,
)
def test_the_nearest_right_word_is_named(words: list[str], remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    assert remedy in capsys.readouterr().err


def test_capitals_in_the_name_of_a_run(
    tmp_path: Path, write_rows: WriteRows, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "sft", f"data.train={write_rows(8)}", "data.val=null", "trainer.precision=32-true"]
    root = tmp_path / "runs"
    assert run(["fit", *words, "--run-name", "MyRun", "--runs-root", str(root)]) == 0
    (folder,) = map(RunFolder, root.iterdir())
    assert folder.id.startswith("myrun-")
    said = capfd.readouterr()
    assert "myrun" in said.err
    assert "loading torch and the model ..." in said.err
    lines = said.out.splitlines()
    assert lines[0] == f"run    {folder.path}", "who watches knows at once where to look"
    assert [line.split()[0] for line in lines if line[:1].strip()][-7:] == [
        "done", "loss", "memory", "time", "run", "export", "next"
    ]  # fmt: skip
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    seconds = next(event["seconds"] for event in events if event["event"] == "timings")
    for phase in ("imports", "data", "model", "first step", "steps", "saving", "export"):
        assert phase in seconds
    assert read_metrics(folder)[0]["step"] == 1, "the loss is known from the first step on"


def test_a_model_and_a_file_are_enough_to_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Spell kamo."}\n')
    assert run(["predict", "demo", str(prompts)]) == 0
    assert json.loads(capsys.readouterr().out)["completion"] == "k-a-m-o"


def test_chat_takes_a_prompt_and_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["chat", "demo", "Spell kamo."]) == 0
    assert capsys.readouterr().out.strip() == "k-a-m-o"
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\n/nonsense\nSpell kamo.\n/reset\n/exit\nSpell tipa.\n"))
    assert run(["chat", "demo"]) == 0
    said = capsys.readouterr().out
    assert "/system TEXT" in said
    assert "no such command: /nonsense" in said
    assert "k-a-m-o" in said
    assert "t-i-p-a" not in said


def test_the_embedded_model_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "demo-20260101-000000"
    (run_folder / "export").mkdir(parents=True)
    (run_folder / "run.json").write_text('{"schema": 1, "id": "demo-20260101-000000"}')
    assert run(["chat", "demo", "Spell kamo.", "--runs-root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == "k-a-m-o"
    assert run(["runs", "show", "demo", "--runs-root", str(tmp_path)]) == 2
    assert "the newest run of the demo is demo-20260101-000000" in capsys.readouterr().err
