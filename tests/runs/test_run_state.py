from __future__ import annotations

import pytest

from lightning_hub.runs.records import Heartbeat, Phase, Status
from lightning_hub.runs.run_state import LeaseSnapshot, Limits, RankSnapshot, RunSnapshot, rank_state, run_verdict

RUNNING = Status(state="running")


def rank(
    number: int = 0, *, phase: Phase = "train", step: int = 5, doing: str = "forward", **look: object
) -> RankSnapshot:
    return RankSnapshot(number, heartbeat=Heartbeat(step=step, phase=phase, doing=doing), **look)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("look", "state"),
    [
        (rank(seconds_without_heartbeat=1, seconds_without_progress=1, alive=True), "train"),
        (rank(phase="eval", seconds_without_heartbeat=1, seconds_without_progress=100), "eval"),
        (rank(phase="save", seconds_without_heartbeat=1, seconds_without_progress=100), "save"),
        (RankSnapshot(0), "init"),
        (rank(seconds_without_heartbeat=1, seconds_without_progress=61), "stalled"),
        (rank(phase="save", seconds_without_heartbeat=1, seconds_without_progress=1801), "stalled"),
        (rank(seconds_without_heartbeat=11, alive=True), "silent"),
        (rank(seconds_without_heartbeat=1000, alive=True), "silent"),
        (rank(seconds_without_heartbeat=21), "lost"),
        (rank(seconds_without_heartbeat=1, alive=False), "lost"),
        (rank(seconds_without_heartbeat=None, alive=None), "train"),
        (rank(exit_code=0, alive=False), "exited"),
        (rank(phase="exit", alive=False), "exited"),
        (rank(exit_code=-9, alive=False), "failed"),
        (rank(has_error=True, seconds_without_heartbeat=1, alive=True), "failed"),
    ],
)
def test_the_state_of_a_rank(look: RankSnapshot, state: str) -> None:
    assert rank_state(look, Limits()) == state


def test_slow_steps_are_no_stall() -> None:
    assert (
        rank_state(rank(seconds_without_heartbeat=1, seconds_without_progress=200), Limits(), median_step_time=30)
        == "train"
    )
    assert (
        rank_state(rank(seconds_without_heartbeat=1, seconds_without_progress=301), Limits(), median_step_time=30)
        == "stalled"
    )


moving = LeaseSnapshot(0, seconds_without_heartbeat=1)
standing = LeaseSnapshot(0, seconds_without_heartbeat=21)


@pytest.mark.parametrize(
    ("look", "state", "sure"),
    [
        (RunSnapshot(None), "unknown", False),
        (RunSnapshot(Status(state="finished"), (rank(exit_code=0),)), "finished", True),
        (RunSnapshot(Status(state="finished"), (rank(exit_code=1),)), "failed", True),
        (RunSnapshot(Status(state="stopped")), "stopped", True),
        (RunSnapshot(RUNNING, (rank(seconds_without_heartbeat=1), rank(1, has_error=True)), (moving,)), "failed", True),
        (RunSnapshot(RUNNING, (rank(seconds_without_heartbeat=1),), (moving,)), "running", True),
        (RunSnapshot(RUNNING, (rank(seconds_without_heartbeat=11),), (moving,)), "running", True),
        (
            RunSnapshot(RUNNING, (rank(seconds_without_heartbeat=1, seconds_without_progress=61),), (moving,)),
            "stalled",
            True,
        ),
        (
            RunSnapshot(
                RUNNING,
                (rank(seconds_without_heartbeat=61, seconds_without_progress=61, alive=True),),
                (LeaseSnapshot(0, 61, alive=True),),
            ),
            "stalled",
            True,
        ),
        (
            RunSnapshot(
                RUNNING, (rank(phase="save", seconds_without_heartbeat=1, seconds_without_progress=61),), (moving,)
            ),
            "running",
            True,
        ),
        (RunSnapshot(RUNNING, (rank(seconds_without_heartbeat=21),), (standing,)), "lost", True),
        (RunSnapshot(RUNNING, (rank(seconds_without_heartbeat=1),), (standing,)), "orphan", True),
        (
            RunSnapshot(
                RUNNING, (rank(seconds_without_heartbeat=1, alive=False),), (LeaseSnapshot(0, 1, alive=False),)
            ),
            "lost",
            True,
        ),
        (RunSnapshot(RUNNING, (rank(),), (LeaseSnapshot(0),)), "running", False),
        (RunSnapshot(Status(state="starting"), owner_alive=True), "starting", True),
        (RunSnapshot(Status(state="starting"), owner_alive=False), "lost", True),
        (RunSnapshot(Status(state="queued")), "queued", False),
    ],
)
def test_the_verdict_on_a_run(look: RunSnapshot, state: str, sure: bool) -> None:
    verdict = run_verdict(look)
    assert (verdict.state, verdict.sure) == (state, sure)


def test_a_stall_names_the_rank_behind_and_what_it_does() -> None:
    ranks = (
        rank(0, step=6, seconds_without_heartbeat=1, seconds_without_progress=70, doing="all_reduce"),
        rank(1, step=5, seconds_without_heartbeat=1, seconds_without_progress=70, doing="forward 2/4"),
    )
    assert run_verdict(RunSnapshot(RUNNING, ranks, (moving,))).reason == (
        "no progress; rank 1 stays at step 5, in forward 2/4"
    )
