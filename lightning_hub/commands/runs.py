"""``lightning-hub runs``: everything in a run folder, as text and as JSON."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from lightning_hub.errors import ConfigError, ExitCode
from lightning_hub.launch.arguments import add_runs_root
from lightning_hub.runs import show
from lightning_hub.runs.files import Json, read_json
from lightning_hub.runs.folder import RunFolder, find_run, list_runs, runs_root
from lightning_hub.runs.logs import (
    LogTail,
    SourceLine,
    all_lines,
    errors_only,
    last_lines,
    merge_by_time,
    printable,
)
from lightning_hub.runs.metrics import Line, metric_names, read_metrics
from lightning_hub.runs.reader import RunReader, RunView, attempts_of, first_error, read_run
from lightning_hub.runs.records import ENDED
from lightning_hub.runs.unused import is_unused

VERBS_OF_OTHERS = {"ls": "list", "ps": "list", "tail": "logs", "log": "logs", "rm": "delete", "kill": "stop"}
"""Verbs of other tools, and ours."""

_POLL = 0.2
_SHOWN_LINES = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code.

    Args:
        argv: Arguments after ``runs``.

    Raises:
        HubError: Wrong arguments, an unknown run, or a run that does not allow the verb.
    """
    arguments, extra = _parse(argv)
    if arguments.name == "resume":
        from lightning_hub.commands.runs_resume import resume  # 0.1 s: only this verb checks a recipe

        return resume(_found(arguments), extra)
    verb: Callable[[argparse.Namespace], int] = arguments.verb
    return verb(arguments)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = build_parser()
    arguments, extra = parser.parse_known_args(argv)
    if arguments.name is None:
        arguments = parser.parse_args(["list"])
    elif extra and arguments.name != "resume":
        parser.error(f"unknown arguments: {' '.join(extra)}")
    return arguments, extra


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        choice = re.fullmatch(r"argument VERB: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice is not None:
            verbs = re.findall(r"\w+", choice[2])
            near = VERBS_OF_OTHERS.get(choice[1]) or next(iter(get_close_matches(choice[1], verbs, 1)), None)
            remedy = f"did you mean runs {near}?" if near else f"use one of {', '.join(verbs)}"
            raise ConfigError(f"no such command: runs {choice[1]:.80}", remedy=remedy)
        raise ConfigError(message, where=self.prog, remedy="see --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``lightning-hub runs``."""
    parser = _Parser(prog="lightning-hub runs", description="Look at runs, follow, stop, delete them.")
    verbs = parser.add_subparsers(dest="name", metavar="VERB")
    common = _Parser(add_help=False)
    add_runs_root(common)
    as_json = _Parser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON value and nothing else")
    one = _Parser(add_help=False)
    one.add_argument("run", metavar="RUN", help="an id, a unique beginning of one, or a path")

    def add(
        name: str, verb: Callable[[argparse.Namespace], int], text: str, *parents: _Parser
    ) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text, parents=[common, *parents])
        made.set_defaults(verb=verb)
        return made

    listed = add("list", _list, "list the runs, the newest last", as_json)
    listed.add_argument("--all", action="store_true", help="also runs that ended before their first step was finished")
    add("show", _show, "show one run: state, ranks, attempts, error", one, as_json)
    _log_options(add("logs", _logs, "print the logs of a run", one))
    metrics = add("metrics", _metrics, "print the metrics of a run", one, as_json)
    metrics.add_argument("--keys", metavar="A,B", help="only these metrics")
    stop = add("stop", _stop, "ask a live run to save a checkpoint and stop", one)
    stop.add_argument("--now", action="store_true", help="end its processes at once, without a new checkpoint")
    delete = add("delete", _delete, "delete a run that has ended, with its checkpoints and export", one)
    delete.add_argument("--yes", action="store_true", help="do not ask")
    add("resume", _stop, "continue a stopped or failed run in the same folder; takes new limits", one)
    return parser


def _log_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, help="only this rank (default: all, merged by time)")
    parser.add_argument("--attempt", type=int, help="this attempt, counted from 1 (default: the newest)")
    parser.add_argument("--errors", action="store_true", help="only tracebacks and lines that name an error")
    parser.add_argument("-f", "--follow", action="store_true", help="print new lines until the run ends")
    parser.add_argument(
        "-n", type=int, default=_SHOWN_LINES, metavar="N", help=f"the last N lines (default {_SHOWN_LINES}; 0: all)"
    )


def _found(arguments: argparse.Namespace) -> RunFolder:
    return find_run(arguments.run, runs_root(arguments.runs_root))


def _print_json(value: Json) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def _list(arguments: argparse.Namespace) -> int:
    root = runs_root(arguments.runs_root)
    found = [read_run(folder) for folder in list_runs(root)]
    views = [view for view in found if arguments.all or not is_unused(view)]
    hidden = len(found) - len(views)
    if arguments.json:
        _print_json([view.to_json() for view in views])
    elif views:
        sys.stdout.write(show.run_table(views) + "\n")
    elif not hidden:
        sys.stdout.write(f"no runs in {root} yet; lightning-hub demo makes the first\n")
    if hidden and not arguments.json:
        runs = "1 run" if hidden == 1 else f"{hidden} runs"
        sys.stdout.write(f"{runs} in which no step was finished: lightning-hub runs list --all\n")
    return ExitCode.DONE


def _show(arguments: argparse.Namespace) -> int:
    folder = _found(arguments)
    view, attempts, error = read_run(folder), attempts_of(folder), first_error(folder)
    if not arguments.json:
        sys.stdout.write(show.run_page(view, attempts, error) + "\n")
        return ExitCode.DONE
    ranks: list[Json] = [rank.to_json() for rank in view.ranks]
    listed: list[Json] = [attempt.to_json() for attempt in attempts]
    details: dict[str, Json] = {
        "ranks": ranks,
        "attempts": listed,
        "error": error.to_json() if error else None,
        "card": _card(view),
    }
    _print_json(view.to_json() | details)
    return ExitCode.DONE


def _card(view: RunView) -> dict[str, Json]:
    """Return what identifies a run for the record: how it was made and what it left."""
    folder = view.folder
    return {
        **view.info.to_json(),
        "exit_code": view.status.exit_code,
        "checkpoint": str(folder.latest.readlink()) if folder.latest.is_symlink() else None,
        "export": str(folder.export.absolute()) if folder.export.is_dir() else None,
        "data": read_json(folder.data_report),
    }


def _logs(arguments: argparse.Namespace) -> int:
    folder = _found(arguments)
    sources = _log_sources(folder, arguments)
    tails = {name: LogTail.at_end(path) for name, path in sources.items()}
    several_ranks = len({name.rpartition(" ")[0] for name in sources}) > 1
    for line in _written_lines(tails, arguments):
        _print_line(line, several_ranks)
    reader = RunReader(folder)
    while arguments.follow:
        ended = reader.look().verdict.state in {*ENDED, "lost"}
        for line in _merged({name: tail.read() for name, tail in tails.items()}, arguments):
            _print_line(line, several_ranks)
        sys.stdout.flush()
        if ended:
            break
        time.sleep(_POLL)
    return ExitCode.DONE


def _print_line(line: SourceLine, with_name: bool) -> None:
    prefix = f"[{line.source.rpartition(' ')[0]}] " if with_name else ""
    sys.stdout.write(f"{prefix}{line.text}\n")


def _log_sources(folder: RunFolder, arguments: argparse.Namespace) -> dict[str, Path]:
    """Return the logs that were asked for: name (``rank 0 stdout``) to first part."""
    attempts = folder.attempts()
    attempt = arguments.attempt or (attempts[-1] if attempts else 0)
    ranks = folder.ranks(attempt)
    if attempt not in attempts:
        known = f"it has {', '.join(map(str, attempts))}" if attempts else "it has none yet"
        raise ConfigError(f"{folder.id} has no attempt {attempt}; {known}", where="--attempt")
    if arguments.rank is not None and arguments.rank not in ranks:
        known = ", ".join(map(str, ranks))
        raise ConfigError(f"attempt {attempt} has no rank {arguments.rank}", where="--rank", remedy=f"it has {known}")
    chosen = ranks if arguments.rank is None else [arguments.rank]
    files = {rank: folder.rank(attempt, rank) for rank in chosen}
    pairs = ((f"rank {rank} {kind}", getattr(files[rank], kind)) for rank in chosen for kind in ("stdout", "stderr"))
    return dict(pairs)


def _written_lines(tails: dict[str, LogTail], arguments: argparse.Namespace) -> Iterable[SourceLine]:
    """Return what was written before the tails begin, so that following shows each line once."""
    count: int = arguments.n
    if arguments.errors or count <= 0:
        merged = _merged({name: all_lines(tail) for name, tail in tails.items()}, arguments)
    else:
        merged = _merged({name: last_lines(tail, count) for name, tail in tails.items()}, arguments)
    return deque(merged, maxlen=count) if count > 0 else merged


def _merged(logs: Mapping[str, Iterable[bytes]], arguments: argparse.Namespace) -> Iterator[SourceLine]:
    only = errors_only if arguments.errors else iter
    return merge_by_time([(name, only(map(printable, lines))) for name, lines in logs.items()])


def _metrics(arguments: argparse.Namespace) -> int:
    folder = _found(arguments)
    lines = read_metrics(folder)
    known = metric_names(lines)
    keys = [key.strip() for key in arguments.keys.split(",") if key.strip()] if arguments.keys else known
    unknown = [key for key in keys if key not in known]
    if unknown:
        remedy = f"it has {', '.join(known)}" if known else "nothing is logged yet"
        raise ConfigError(f"{folder.id} has no metric {unknown[0]!r:.80}", where="--keys", remedy=remedy)
    chosen: list[Line] = [
        {name: line.get(name) for name in ("step", "time", "attempt")} | {key: line[key] for key in keys if key in line}
        for line in lines
        if any(key in line for key in keys)
    ]
    if arguments.json:
        _print_json([dict(line) for line in chosen])
    elif chosen:
        rows = [[str(line["step"]), *(show.number(line.get(key)) for key in keys)] for line in chosen]
        sys.stdout.write(show.table(["step", *map(show.clean, keys)], rows) + "\n")
    else:
        sys.stdout.write(f"{folder.id} has logged no metrics yet\n")
    return ExitCode.DONE


def _stop(arguments: argparse.Namespace) -> int:
    folder = _found(arguments)
    view = read_run(folder)
    if not view.is_live:
        raise ConfigError(f"{folder.id} does not run: it is {view.verdict.state}", where="RUN")
    from lightning_hub.runs.stopping import request_stop, stop_now  # 0.03 s, which a listing need not pay

    sys.stdout.write((stop_now(folder) if arguments.now else request_stop(folder, view)) + "\n")
    return ExitCode.DONE


def _delete(arguments: argparse.Namespace) -> int:
    folder = _found(arguments)
    view = read_run(folder)
    if view.is_live:
        remedy = f"lightning-hub runs stop {folder.id} first"
        raise ConfigError(f"{folder.id} is {view.verdict.state}: a live run is not deleted", where="RUN", remedy=remedy)
    if folder.path.is_symlink() or not folder.info().id:
        raise ConfigError("this is not a run folder: it is not deleted", where=str(folder.path))
    if not arguments.yes and not _confirmed(folder):
        sys.stdout.write("nothing was deleted\n")
        return ExitCode.DONE
    doomed = folder.path.with_name(f".{folder.id}.deleted")
    folder.path.rename(doomed)  # readers miss it at once, however long the removal takes
    shutil.rmtree(doomed)
    sys.stdout.write(f"{folder.id} is deleted\n")
    return ExitCode.DONE


def _confirmed(folder: RunFolder) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to confirm on", where="runs delete", remedy="give --yes")
    size = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file() and not path.is_symlink())
    sys.stdout.write(f"Delete {folder.path} ({size / 1e6:.1f} MB, checkpoints and export included)? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
