from __future__ import annotations

import pytest

from lightning_hub.config.help import class_help, plain_text, recipe_help
from lightning_hub.config.schema import ClassInfo, shipped_schema
from lightning_hub.errors import ConfigError


@pytest.mark.parametrize("info", shipped_schema().classes, ids=lambda info: info.name)
def test_every_option_is_in_the_help_of_its_class(info: ClassInfo) -> None:
    sections = {"callback": "trainer.callbacks", "logger": "trainer.logger", "strategy": "trainer.strategy"}
    if info.kind == "settings":
        return
    text = class_help([f"--{sections.get(info.kind, info.kind)}.help", info.name])
    assert text is not None
    assert " ".join(plain_text(info.summary).split()) in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80 or "http" in text, "the smallest terminal shows it whole"
    assert "``" not in text
    for option in info.options.values():
        assert f"  {option.name}: " in text


def test_help_without_a_name_lists_the_classes() -> None:
    text = class_help(["--trainer.callbacks.help"])
    assert text is not None
    assert "EarlyStopping" in text
    assert "GenerateSamples" in text
    assert class_help(["--config", "x.yaml"]) is None


def test_wrong_names_get_the_right_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"no model 'STF'.*did you mean SFT"):
        class_help(["--model.help=STF"])
    with pytest.raises(ConfigError, match=r"no section 'modle'.*did you mean --model\.help"):
        class_help(["--modle.help"])


def test_the_help_of_a_command_names_flags_sections_and_classes() -> None:
    text = recipe_help("fit", [("--run-dir", "where")])
    for part in ("--run-dir", "SFT", "ChatData", "checkpoint", "--model.help SFT"):
        assert part in text
