"""``lightning-hub doctor``: check this machine, and prove that its numbers are right."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence

from lightning_hub.config.help import plain_text
from lightning_hub.doctor.environment import check_machine
from lightning_hub.doctor.findings import Finding
from lightning_hub.doctor.proofs import PROOFS, run_proofs
from lightning_hub.errors import ExitCode
from lightning_hub.launch.arguments import add_runs_root
from lightning_hub.runs.folder import runs_root


def main(argv: Sequence[str]) -> int:
    """Print a line for each check; the exit code is 3 if a check of the machine fails, 1 if a proof fails."""
    given = _parser().parse_args(argv)
    environment = _told(check_machine(runs_root(given.runs_root)), quiet=given.json)
    proofs: list[Finding] = []
    if given.proof is not None:
        proofs = _told(run_proofs(given.proof or list(PROOFS)), quiet=given.json)
    if given.json:
        print(json.dumps([finding.to_json() for finding in environment + proofs], indent=1))
    if not all(finding.ok for finding in proofs):
        return ExitCode.FAILED
    return ExitCode.DONE if all(finding.ok for finding in environment) else ExitCode.PREFLIGHT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-hub doctor", description=plain_text(__doc__))
    parser.add_argument(
        "--proof",
        nargs="*",
        choices=list(PROOFS),
        help="prove equalities of training on this machine, by default all: about a minute, on two processes",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    add_runs_root(parser)
    return parser


def _told(findings: Iterable[Finding], *, quiet: bool) -> list[Finding]:
    """Print each finding as it comes, and return all."""
    listed = []
    for finding in findings:
        listed.append(finding)
        if not quiet:
            print(finding, flush=True)
    return listed
