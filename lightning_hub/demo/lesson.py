"""Fine-tunes the embedded model on generated data, from conversations to an exported model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_hub.config.command import parse_command
from lightning_hub.demo.methods import (
    FACTS,
    SHOWN,
    TESTED,
    WORDS_SEED,
    answers,
    facts,
    method_flags,
    share,
    write_facts,
    write_rows,
)
from lightning_hub.demo.tasks import NUMBERS, SHOUT, TURN_ROUND, ChatExample, conversations, turned_words, words
from lightning_hub.errors import ExitCode
from lightning_hub.launch.attempt import start_attempt
from lightning_hub.launch.messages import LOADING, print_note, print_notice
from lightning_hub.launch.options import RunOptions
from lightning_hub.launch.run_setup import check_and_fill, write_run
from lightning_hub.launch.topology import single_process
from lightning_hub.runs.folder import EMBEDDED_MODEL, RunFolder, create_run, runs_root

DEMO_RECIPE = Path(__file__).with_name("recipe.yaml")
TRAINED, VALIDATED, ASKED = 4000, 160, 3
"""Number of conversations to train on, to validate on, and to print."""

FACTS_SEED = 7
"""Seed of the facts that ``--method`` trains."""


def demonstrate(method: str | None, root: str | None) -> int:
    """Fine-tune the embedded model and print what it has learned."""
    console = Console(highlight=False)
    folder = create_run("demo", runs_root(root))
    print_notice(LOADING)
    lesson = _numbers(folder, method) if method else _shouting(folder)
    console.print("[bold]Lightning Hub demo[/]: a small language model learns a new task")
    console.print(f"  model  embedded, {_size(lesson.model)}; it can {lesson.can}")
    console.print(f"  task   [cyan]{lesson.example[0]}[/] -> [green]{lesson.example[1]}[/]")
    console.print(f"  data   {lesson.data}\n")
    return _train(folder, lesson, console)


@dataclass(frozen=True)
class Lesson:
    """The task of a demo.

    Attributes:
        model: The embedded model that is trained, as a recipe names it.
        flags: The arguments of ``fit``.
        can: What the model can do before the training.
        example: A question of the new task and its answer.
        data: A description of the training and validation data.
        prompts: Questions whose answers are printed, before and after training.
        tests: Conversations on which the model is tested before and after training, by title.
    """

    model: str
    flags: list[str]
    can: str
    example: tuple[str, str]
    data: str
    prompts: list[str]
    tests: dict[str, list[ChatExample]]


def _shouting(folder: RunFolder) -> Lesson:
    rows = conversations((SHOUT,), TRAINED + VALIDATED, seed=7)
    train, val = write_rows(_data_folder(folder), rows[:TRAINED], rows[TRAINED:])
    return Lesson(
        model=EMBEDDED_MODEL,
        flags=["--config", str(DEMO_RECIPE), "--data.train", str(train), "--data.val", str(val)],
        can="spell and reverse words",
        example=(SHOUT.question.format(word="kamo"), SHOUT.answer("kamo")),
        data=f"{TRAINED:,} conversations to train on, {VALIDATED} to validate on",
        prompts=[SHOUT.question.format(word=word) for word in words(TRAINED + VALIDATED + ASKED, seed=7)[-ASKED:]],
        tests={},
    )


def _numbers(folder: RunFolder, method: str) -> Lesson:
    from lightning_hub.models.pretrained import ROOM_FOLDER  # 4 s: torch and transformers, needed anyway

    train, val = write_facts(_data_folder(folder), FACTS_SEED)
    known, new = turned_words(TESTED, WORDS_SEED), facts(FACTS_SEED)
    question, answer = (turn["content"] for turn in new[0]["messages"])
    return Lesson(
        model=str(ROOM_FOLDER),
        flags=method_flags(method, train, val, str(ROOM_FOLDER)),
        can="reverse words",
        example=(question, answer),
        data=f"{SHOWN:,} conversations to train on: {FACTS} numbers to learn, each many times",
        prompts=[row["messages"][0]["content"] for row in (*known[:2], *new[:2])],
        tests={f"knew: {TURN_ROUND}": known, f"new: {NUMBERS}": new},
    )


def _train(folder: RunFolder, lesson: Lesson, console: Console) -> int:
    recipe = parse_command(lesson.flags).recipe
    options = RunOptions()
    config = check_and_fill(recipe, options, print_note)
    config = single_process(config)
    run = write_run(folder, recipe, config, options)
    import torch  # 2 s, and 2 s more for the training run

    from lightning_hub.training.run import TrainingRun

    torch.set_num_threads(1)  # more threads do not make this small model faster, and are slow on a busy machine
    before = answers(lesson.model, lesson.prompts)
    known = {title: share(lesson.model, rows) for title, rows in lesson.tests.items()}
    session = TrainingRun(config, start_attempt(run, "never"), run, is_summed_up=False)
    code: int = ExitCode.FAILED
    try:
        code = session.fit()
    finally:
        run.close(code)
    if code == ExitCode.DONE:
        made = str(folder.export)
        after = answers(made, lesson.prompts)
        scores = [(title, known[title], share(made, rows)) for title, rows in lesson.tests.items()]
        _show(
            console, folder, session.recorder.val_losses, list(zip(lesson.prompts, before, after, strict=True)), scores
        )
    return code


def _data_folder(folder: RunFolder) -> Path:
    data = folder.path / "data"
    data.mkdir(mode=0o700)
    return data


def _size(model: str) -> str:
    from lightning_hub.models.pretrained import Pretrained  # 4 s: torch and transformers, needed anyway

    return f"{(Pretrained(model).path / 'model.safetensors').stat().st_size / 2e6:.1f} M parameters"


def _show(
    console: Console,
    folder: RunFolder,
    losses: dict[int, float],
    compared: list[tuple[str, str, str]],
    scores: list[tuple[str, float, float]],
) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 2))
    for title in ("", "before", "after"):
        table.add_column(title, header_style="dim")
    table.add_row("validation loss", f"{losses[0]:.4f}", f"[bold]{losses[max(losses)]:.4f}[/]")
    for prompt, before, after in compared:
        table.add_row(f"[cyan]{prompt}[/]", before, f"[bold green]{after}[/]")
    for title, before_training, after_training in scores:
        table.add_row(f"right answers, {title}", f"{before_training:.0%}", f"[bold]{after_training:.0%}[/]")
    console.print()
    console.print(table)
    run = shlex.quote(folder.id)
    config = shlex.quote(str(folder.config))
    is_plain = (folder.export / "config.json").is_file()
    kind = "a plain Hugging Face folder" if is_plain else f"an adapter; `lightning-hub export {run} --merge` merges it"
    console.print(f"\n  run     {folder.path}\n  export  {folder.export}  ({kind})\n")
    console.print("What next:")
    for command, why in (
        (f"lightning-hub chat {run}", "talk to it"),
        (f"lightning-hub runs show {run}", "look at the run"),
        (f"lightning-hub data --config {config} --sample 1", "what it saw"),
        ("lightning-hub fit sft model.model=MODEL data.train=FILE", "your own"),
    ):
        console.print(f"  {command}  [dim]# {why}[/]", highlight=False, soft_wrap=True)
