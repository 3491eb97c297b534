"""Arguments that several verbs share; this module imports nothing that a listing of runs does not need."""

from __future__ import annotations

from argparse import ArgumentParser

RUNS_ROOT_HELP = "where runs are kept (LIGHTNING_HUB_RUNS, else runs/)"
TRUST_HELP = "let Python files of the model run"


def add_runs_root(parser: ArgumentParser) -> None:
    """Add ``--runs-root`` to a verb that finds runs."""
    parser.add_argument("--runs-root", metavar="DIR", help=RUNS_ROOT_HELP)


def add_trust_remote_code(parser: ArgumentParser) -> None:
    """Add ``--trust-remote-code`` to a verb that loads a model."""
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
