"""The five proofs. Each runs in separate processes; this process starts them and reads their findings."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning_hub.doctor.children import Child, ChildrenFailedError, run_children, run_ranks
from lightning_hub.doctor.findings import DISTRUST, Finding, read_findings
from lightning_hub.doctor.sample_data import ROWS, write_chats
from lightning_hub.errors import ExitCode

PROOFS = {
    "packed": "packed = unpacked",
    "accumulated": "accumulated = one batch",
    "exported": "exported = trained",
    "ranks": "2 ranks = 1 rank",
    "resumed": "resumed = straight",
}
"""The names of the proofs and the equality that each checks, in their order."""

STOP_AFTER = 3
"""The step after which the run of the resume proof is stopped; it is in the middle of the first epoch."""


@dataclass(frozen=True)
class Stage:
    """Processes that run at the same time.

    Attributes:
        proofs: The proofs that fail if one of these processes fails.
        run: Runs the processes in the folder of the proof.
        findings: The file of findings that they write; None if the next stage writes the findings.
    """

    proofs: tuple[str, ...]
    run: Callable[[Path], None]
    findings: str | None = None


def run_proofs(wanted: Sequence[str]) -> Iterator[Finding]:
    """Run proofs and yield each finding as soon as it is known.

    Args:
        wanted: Names from ``PROOFS``.
    """
    with tempfile.TemporaryDirectory(prefix="lightning-hub-proof-") as name:
        folder, failed = Path(name), set[str]()
        write_chats(folder)
        for stage in _stages(folder, wanted):
            affected = [proof for proof in stage.proofs if proof not in failed]
            if not affected:
                continue
            try:
                stage.run(folder)
            except ChildrenFailedError as error:
                failed.update(affected)
                yield from (Finding(PROOFS[proof], False, str(error), DISTRUST) for proof in affected)
                continue
            if stage.findings:
                yield from read_findings(folder / stage.findings)


def _stages(folder: Path, wanted: Sequence[str]) -> Iterator[Stage]:
    """Yield the stages in order; a later stage can need files of an earlier one."""
    where = str(folder)
    alone = tuple(name for name in PROOFS if name in wanted and name != "resumed")
    if alone:
        child = Child("one process", ("lightning_hub.doctor.single_rank", where, *alone))
        yield Stage(alone, partial(run_children, [child]), "one_process.json")
    if "ranks" in wanted:
        yield Stage(("ranks",), partial(run_ranks, 2, ("lightning_hub.doctor.rank", where)), "rank.json")
    if "resumed" in wanted:
        both = [_fit(folder, "straight"), _fit(folder, "stopped", stop=True)]
        yield Stage(("resumed",), partial(run_children, both))
        child = Child("resumed run", ("lightning_hub.doctor.resumed", where), NO_GPU)
        yield Stage(("resumed",), partial(run_children, [child]), "resumed.json")


NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Resume is bit-identical on a CPU only, because some GPU kernels add in a different order each time."""


def _fit(folder: Path, name: str, *, stop: bool = False) -> Child:
    """Return a run of two epochs with NEFTune noise, which uses the random state in every step."""
    stopper = {"class_path": "lightning_hub.doctor.stop_after.StopAfter", "init_args": {"step": STOP_AFTER}}
    # fmt: off
    arguments = (
        "lightning_hub", "fit", "--run-dir", str(folder / name),
        "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_epochs", "2",
        "--trainer.log_every_n_steps", "1", "--trainer.callbacks", json.dumps([stopper] if stop else []),
        "--model", "SFT", "--model.model", "demo", "--model.learning_rate", "1e-3", "--model.neftune_alpha", "5",
        "--data", "ChatData", "--data.train", str(folder / ROWS), "--data.max_seq_len", "96",
        "--data.effective_batch_size", "8",
    )
    # fmt: on
    return Child(f"{name} run", arguments, NO_GPU, ExitCode.STOPPED if stop else ExitCode.DONE)
