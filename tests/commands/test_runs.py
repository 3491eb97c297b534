from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lightning_hub.commands import runs_resume
from lightning_hub.commands.runs import main
from lightning_hub.errors import HubError
from lightning_hub.runs.files import write_json
from lightning_hub.runs.folder import RunFolder, create_run
from lightning_hub.runs.rank_writer import RankWriter
from lightning_hub.runs.show import age, clean, table, topology
from lightning_hub.runs.writer import RunWriter
from tests.conftest import time_of_children
from tests.runs.conftest import NEW

Hub = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(root: Path, capsys: pytest.CaptureFixture[str]) -> Hub:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        try:
            code = main([*words, "--runs-root", str(root)])
        except HubError as error:
            return error.exit_code, capsys.readouterr().out, f"{error}\n"
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def ended(folder: RunFolder, run: RunWriter) -> RunFolder:
    rank = RankWriter(folder, run.start_attempt("first start"))
    rank.start()
    for step in (1, 2, 3):
        rank.log(step, {"loss": 1 / step, "lr": 1e-5, **({"val_loss": 0.5} if step == 2 else {})})
        print(f"step {step}")
    print("Traceback (most recent call last):\n  File x\nValueError: \x1b[31mbad", file=sys.stderr)
    rank.close()
    run.set_status("finished", step=3, max_steps=3, exit_code=0)
    run.close()
    return folder


@pytest.fixture
def live(root: Path) -> Iterator[RunFolder]:
    writer = RunWriter.create(create_run("live", root), NEW)
    rank = RankWriter(writer.folder, writer.start_attempt("first start"))
    rank.start()
    writer.set_status("running")
    yield writer.folder
    rank.close()
    writer.close()


def test_list_as_json_holds_the_promised_keys(hub: Hub, ended: RunFolder) -> None:
    code, out, err = hub("list", "--json")
    assert (code, err) == (0, "")
    (run,) = json.loads(out)
    promised = {"id", "path", "state", "method", "model", "step", "max_steps", "loss", "tokens_per_second", "age"}
    assert promised <= run.keys()
    assert (run["id"], run["state"], run["step"], run["max_steps"], run["loss"]) == (ended.id, "finished", 3, 3, 1 / 3)
    assert run["path"] == str(ended.path)
    assert run["age"] >= 0


def test_list_as_text(hub: Hub, ended: RunFolder) -> None:
    assert hub("list")[1].splitlines()[1].split()[:6] == [ended.id, "finished", "sft", "tiny", "3/3", "0.3333"]


def test_an_empty_root_says_what_to_do(hub: Hub) -> None:
    assert hub("list") == (0, hub("list")[1], "")
    assert "lightning-hub demo" in hub("list")[1]
    assert json.loads(hub("list", "--json")[1]) == []


def test_show_as_json_holds_the_promised_keys(hub: Hub, ended: RunFolder) -> None:
    run = json.loads(hub("show", ended.id[:6], "--json")[1])
    assert {"ranks", "attempts", "error", "card"} <= run.keys()
    assert {"rank", "node", "step", "phase", "age", "state"} <= run["ranks"][0].keys()
    assert (run["ranks"][0]["state"], run["error"], run["attempts"][0]["reason"]) == ("exited", None, "first start")
    assert run["card"]["config_sha256"]


def test_show_as_text_tells_the_error(hub: Hub, ended: RunFolder) -> None:
    write_json(
        ended.rank(1, 0).error, {"type": "ValueError", "message": "bad\x1b", "rank": 0, "step": 3, "class": "data"}
    )
    out = hub("show", str(ended.path))[1]
    assert "error on rank 0, step 3, class data:\n  ValueError: bad\\x1b" in out
    assert "first start" in out


def test_logs(hub: Hub, ended: RunFolder) -> None:
    trace = ["Traceback (most recent call last):", "  File x", "ValueError: \\x1b[31mbad"]
    assert hub("logs", "sft")[1].splitlines() == ["step 1", "step 2", "step 3", *trace]
    assert hub("logs", "sft", "-n", "1")[1].splitlines() == trace[-1:]
    assert hub("logs", "sft", "--errors", "--rank", "0", "--attempt", "1")[1].splitlines() == trace
    assert hub("logs", "sft", "--follow", "-n", "0")[1].splitlines() == ["step 1", "step 2", "step 3", *trace]


def test_logs_of_several_ranks_carry_their_rank(hub: Hub, ended: RunFolder) -> None:
    other = ended.rank(1, 1)
    other.path.mkdir()
    other.stdout.write_text("hello\n")
    assert "[rank 0] step 1" in hub("logs", "sft")[1]
    assert "[rank 1] hello" in hub("logs", "sft")[1]
    assert hub("logs", "sft", "--rank", "1")[1] == "hello\n"


def test_following_shows_each_line_once_until_the_run_ends(root: Path, folder: RunFolder, run: RunWriter) -> None:
    files = folder.rank(run.start_attempt("test"), 0)
    files.path.mkdir()
    run.set_status("running")
    files.stdout.write_text("0\n")
    command = [
        sys.executable,
        "-u",
        "-c",
        "import sys\nfrom lightning_hub.commands.runs import main\nsys.exit(main(sys.argv[1:]))",
    ]
    follow = subprocess.Popen(
        [*command, "logs", "sft", "-f", "--runs-root", str(root)], stdout=subprocess.PIPE, text=True
    )
    assert follow.stdout is not None
    for number in range(1, 4):
        assert follow.stdout.readline() == f"{number - 1}\n"
        with files.stdout.open("a") as log:
            log.write(f"{number}\n")
    run.set_status("finished", exit_code=0)
    run.close()
    assert (follow.communicate()[0], follow.returncode) == ("3\n", 0)


def test_metrics(hub: Hub, ended: RunFolder) -> None:
    lines = json.loads(hub("metrics", "sft", "--json")[1])
    assert [line["loss"] for line in lines] == [1.0, 0.5, 1 / 3]
    chosen = json.loads(hub("metrics", "sft", "--keys", "val_loss", "--json")[1])
    assert [(line["step"], line["val_loss"]) for line in chosen] == [(2, 0.5)]
    assert hub("metrics", "sft", "--keys", "loss,lr")[1].splitlines()[2].split() == ["2", "0.5", "1e-05"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "nothing"], "no run 'nothing'"),
        (["metrics", "sft", "--keys", "losss"], "no metric 'losss'; it has loss, lr, val_loss"),
        (["logs", "sft", "--rank", "7"], "no rank 7; it has 0"),
        (["logs", "sft", "--attempt", "7"], "no attempt 7; it has 1"),
        (["stop", "sft"], "does not run: it is finished"),
        (["delete", "sft"], "give --yes"),
        (["lst"], "did you mean runs list?"),
        (["show"], "required: RUN"),
        (["list", "--what"], "unknown arguments: --what"),
    ],
)
@pytest.mark.usefixtures("ended")
def test_wrong_words_give_one_sentence(hub: Hub, words: list[str], said: str) -> None:
    code, out, err = hub(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_live_run_is_stopped_by_a_wish_and_not_deleted(hub: Hub, live: RunFolder) -> None:
    code, _, err = hub("delete", "live", "--yes")
    assert (code, live.path.exists()) == (2, True)
    assert f"runs stop {live.id}" in err
    assert not live.control_stop.exists()
    assert hub("stop", "live")[0] == 0
    assert live.control_stop.exists()


def test_delete_takes_the_run_and_nothing_else(hub: Hub, ended: RunFolder, tmp_path: Path) -> None:
    kept = tmp_path / "model"
    kept.mkdir()
    (kept / "weights").touch()
    (ended.path / "link").symlink_to(kept)
    assert hub("delete", ended.id, "--yes")[0] == 0
    assert list(ended.path.parent.iterdir()) == []
    assert (kept / "weights").exists()


def test_a_folder_that_is_no_run_is_not_deleted(hub: Hub, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("config.yaml", "run.json"):
        (project / name).write_text("{}")
    assert hub("delete", str(project), "--yes")[0] == 2
    assert (project / "config.yaml").exists()


def test_resume_is_handed_over_with_its_arguments(
    ended: RunFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[RunFolder, list[str]]] = []

    def resume(folder: RunFolder, arguments: Sequence[str]) -> int:
        called.append((folder, list(arguments)))
        return 4

    words = ["resume", "sft", "--runs-root", str(root), "--trainer.max_epochs", "5", "--detach"]
    monkeypatch.setattr(runs_resume, "resume", resume)
    assert main(words) == 4
    assert called == [(RunFolder(root / ended.id), ["--trainer.max_epochs", "5", "--detach"])]


def test_two_hundred_runs_are_listed_in_a_blink_without_anything_heavy(root: Path, ended: RunFolder) -> None:
    files = {path.relative_to(ended.path): path.read_bytes() for path in ended.path.rglob("*") if path.is_file()}
    for number in range(200):
        for name, data in files.items():
            path = root / f"copy-{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    code = (
        "import sys\nfrom lightning_hub.commands.runs import main\n"
        f"assert main(['list', '--json', '--runs-root', {str(root)!r}]) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'ruamel.yaml', 'lightning_hub.config'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    began = time_of_children()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time_of_children() - began < 1.5  # 0.3 s on a quiet machine
    assert len(json.loads(done.stdout)) == 201


def test_tables_align_and_hold_no_control_characters() -> None:
    text = table(("A", "N"), [("\u4f60\u597d", "1"), ("x", "22")])
    assert text == "A      N\n\u4f60\u597d   1\nx     22"
    assert clean("a\nb\x1b[31m[red]") == "a b\\x1b[31m[red]"
    assert [age(value) for value in (None, 3.2, 61, 7200, 200000)] == ["-", "3s", "1m", "2h", "2d"]
    assert [topology(*one) for one in ((1, 1), (1, 2), (3, 1), (2, 8))] == [
        "1 process",
        "2 processes",
        "3 nodes x 1 process",
        "2 nodes x 8 processes",
    ]
