"""``lightning-hub data``: what the model of a recipe will see, token by token, and a report of all examples."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hub.commands.recipe_arguments import show_help
from lightning_hub.errors import ConfigError, ExitCode
from lightning_hub.launch.messages import print_note, print_notice
from lightning_hub.launch.options import parse
from lightning_hub.launch.run_setup import check_and_fill
from lightning_hub.launch.topology import single_process

DEFAULT_LIMIT = 5
"""Samples that are shown without ``--limit``."""

DATA_FLAGS = (
    ("--sample", "only the sample of this number, counted from 1"),
    ("--limit", f"at most so many samples (default {DEFAULT_LIMIT}; all with --json)"),
    ("--json", "print one JSON list and nothing else"),
)


def main(argv: Sequence[str]) -> int:
    """Show samples, and the report of the whole input unless one sample was asked for."""
    if show_help("data", argv, DATA_FLAGS):
        return ExitCode.DONE
    as_json = "--json" in argv
    words = [word for word in argv if word != "--json"]
    command, options, given = parse("data", words, ["--sample", "--limit"])
    config = check_and_fill(command.recipe, options, print_note)
    config = single_process(config)
    sample, limit = _number(given.sample, "--sample"), _number(given.limit, "--limit")
    print_notice("loading the tokenizer and the data")
    from lightning_hub.data.inspection import describe, report_lines  # 4 s: torch and transformers
    from lightning_hub.methods.run_context import RunContext
    from lightning_hub.training.run import build_trainer

    cli = build_trainer(config, context=RunContext(options.trust_remote_code))
    data, pretrained = cli.datamodule, cli.model.pretrained
    shown = limit if limit is not None or as_json else DEFAULT_LIMIT
    describe(
        data.settings, pretrained.tokenizer, sample=sample, limit=shown, as_json=as_json, stop_ids=pretrained.stop_ids
    )
    if not as_json and sample is None:
        prepared = data.open(pretrained)
        print("\n".join(report_lines(prepared.report)))
        if prepared.val_report is not None:
            print("\n".join(report_lines(prepared.val_report, "val")))
    return ExitCode.DONE


def _number(given: str | None, flag: str) -> int | None:
    if given is None:
        return None
    if not given.isdigit():
        raise ConfigError(f"{given!r} is not a number", where=flag, remedy="give a whole number")
    return int(given)
