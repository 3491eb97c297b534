"""``lightning-hub demo``: the main job on the embedded model and data, from chat rows to an exported model."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_hub.config.command import parse_command
from lightning_hub.config.helptext import plain
from lightning_hub.demo.tasks import PRETRAINING, SHOUT, conversations, words
from lightning_hub.errors import ExitCode
from lightning_hub.launch.topology import settle_alone
from lightning_hub.runs.folder import RunFolder, create_run, runs_root
from lightning_hub.runs.terminal import independent_of_terminal
from lightning_hub.training.attempt import begin
from lightning_hub.training.command import checked
from lightning_hub.training.folder import write_run
from lightning_hub.training.notice import LOADING, notice
from lightning_hub.training.options import Options

RECIPE = Path(__file__).with_name("recipe.yaml")
METHODS = ("sft", "osft", "lora")
"""What ``--method`` takes; all but the first have a file beside the recipe that says where they differ from it."""
TRAINED, VALIDATED, ASKED, TESTED = 4000, 160, 3, 60
"""Conversations to train on, to validate on, and to show; words on which each task is tested."""


def main(argv: Sequence[str]) -> int:
    """Fine-tune the embedded model and show what it has learnt."""
    parser = argparse.ArgumentParser(prog="lightning-hub demo", description=plain(__doc__))
    parser.add_argument("--method", choices=METHODS, help="train with it, and test what the model knew before, too")
    parser.add_argument("--runs-root", help="where runs are kept (LIGHTNING_HUB_RUNS, else runs/)")
    given = parser.parse_args(argv)
    with independent_of_terminal():
        return _demonstrate(given.method, given.runs_root)


def _demonstrate(method: str | None, root: str | None) -> int:
    console = Console(highlight=False)
    folder = create_run("demo", runs_root(root))
    train, val = _write_data(folder)
    notice(LOADING)
    console.print("[bold]Lightning Hub demo[/]: a small language model learns a new task")
    console.print(f"  model  embedded, {_size()}; it can spell and reverse words")
    console.print(f"  task   [cyan]{SHOUT.question.format(word='kamo')}[/] -> [green]{SHOUT.answer('kamo')}[/]")
    console.print(f"  data   {TRAINED:,} conversations to train on, {VALIDATED} to validate on\n")
    return _train(folder, train, val, console, method)


def _train(folder: RunFolder, train: Path, val: Path, console: Console, method: str | None) -> int:
    flags = ["--config", str(RECIPE), "--data.train", str(train), "--data.val", str(val)]
    if method not in (None, METHODS[0]):
        flags += ["--config", str(RECIPE.with_name(f"{method}.yaml"))]
    recipe = parse_command(flags).recipe
    options = Options()
    tree = checked(recipe, options)
    settle_alone(tree["trainer"])
    run = write_run(folder, recipe, tree, options)
    import torch  # 2 s, and 2 s more for the session

    from lightning_hub.training.session import Session

    torch.set_num_threads(1)  # a model this small gains nothing from more, and loses much on a busy machine
    prompts = [SHOUT.question.format(word=word) for word in words(TRAINED + VALIDATED + ASKED, seed=7)[-ASKED:]]
    before = _answers("demo", prompts)
    known = _knowledge("demo") if method else {}
    session = Session(tree, begin(run, "never"), run, is_summed_up=False)
    code: int = ExitCode.FAILED
    try:
        code = session.fit()
    finally:
        run.close(code)
    if code == ExitCode.DONE:
        after = _answers(str(folder.export), prompts)
        learnt = _knowledge(str(folder.export)) if method else {}
        scores = [(title, known[title], learnt[title]) for title in known]
        _show(console, folder, session.recorder.val_losses, list(zip(prompts, before, after, strict=True)), scores)
    return code


def _write_data(folder: RunFolder) -> tuple[Path, Path]:
    rows = conversations((SHOUT,), TRAINED + VALIDATED, seed=7)
    data = folder.path / "data"
    data.mkdir(mode=0o700)
    paths = data / "train.jsonl", data / "val.jsonl"
    for path, part in zip(paths, (rows[:TRAINED], rows[TRAINED:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        path.chmod(0o600)
    return paths


def _size() -> str:
    from lightning_hub.models.pretrained import EMBEDDED_FOLDER  # 4 s: torch and transformers, needed in any case

    return f"{(EMBEDDED_FOLDER / 'model.safetensors').stat().st_size / 2e6:.1f} M parameters"


def _answers(model: str, prompts: list[str]) -> list[str]:
    import torch  # loaded by now

    from lightning_hub.models.generation import complete
    from lightning_hub.models.pretrained import Pretrained

    pretrained = Pretrained(model)
    loaded = pretrained.load(dtype=torch.float32, attn_implementation="sdpa").eval()
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return complete(loaded, pretrained.tokenizer, turns, max_new_tokens=24)


def _knowledge(model: str) -> dict[str, float]:
    """Return the share of right answers about new words, for what the model knew before and for the new task."""
    found = {}
    for title, tasks in (("knew: spell, reverse", PRETRAINING), ("new: shout", (SHOUT,))):
        rows = conversations(tasks, TESTED, seed=11)
        answers = _answers(model, [row["messages"][0]["content"] for row in rows])
        right = sum(answer == row["messages"][1]["content"] for answer, row in zip(answers, rows, strict=True))
        found[title] = right / TESTED
    return found


def _show(
    console: Console,
    folder: RunFolder,
    losses: dict[int, float],
    answers: list[tuple[str, str, str]],
    scores: list[tuple[str, float, float]],
) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 2))
    for title in ("", "before", "after"):
        table.add_column(title, header_style="dim")
    table.add_row("validation loss", f"{losses[0]:.4f}", f"[bold]{losses[max(losses)]:.4f}[/]")
    for prompt, before, after in answers:
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
        ("lightning-hub fit --config configs/sft.yaml --model.model MODEL --data.train FILE", "your own"),
    ):
        console.print(f"  {command}  [dim]# {why}[/]", highlight=False, soft_wrap=True)
