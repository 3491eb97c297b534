"""Preparation as a whole: accounts, strictness, splits, weights, cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lightning_hub.data import cache
from lightning_hub.data.prepare import Prepared, prepare
from lightning_hub.data.report import BadExamplesError
from lightning_hub.data.sample_store import SampleStore, ragged_ranges
from lightning_hub.data.settings import DataSettings, InputError, OnLong, Source
from lightning_hub.errors import ConfigError, DataError
from lightning_hub.ops.batch import IGNORE_INDEX
from tests.data.template_families import TEMPLATES, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer((TEMPLATES / "chatml.jinja").read_text(encoding="utf-8"))


def chat(number: int, answer: str = "it is sunny") -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"{answer} {number}"},
        ]
    }


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


Prepare = Callable[..., Prepared]


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Prepare:
    def call(train: object, **settings: object) -> Prepared:
        train = str(train) if isinstance(train, Path) else train
        return prepare(DataSettings(train, **settings), tokenizer, cache_dir=tmp_path / "cache")  # type: ignore[arg-type]

    return call


def texts(samples: SampleStore, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode(samples[index][0])) for index in range(len(samples))]


def pairs(samples: SampleStore) -> list[tuple[list[int], list[int]]]:
    return [(samples[i][0].tolist(), samples[i][1].tolist()) for i in range(len(samples))]


def test_a_second_start_maps_the_same_samples(run: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(n) for n in range(5)])
    first, second = run(path), run(path)
    assert (first.cached, second.cached) == (False, True)
    assert isinstance(second.train.ids, np.memmap)
    assert pairs(first.train) == pairs(second.train)
    assert (first.train.fingerprint, first.report) == (second.train.fingerprint, second.report)


def test_whatever_shapes_the_tokens_makes_a_new_entry(
    run: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [chat(n) for n in range(5)])
    made = [run(path), run(path, train_on="last"), run(path, chat_template="chatml")]
    made.append(prepare(DataSettings(str(path)), tokenizer, cache_dir=tmp_path / "cache", stop_ids=[3]))
    write(path, [chat(n) for n in range(6)])
    made.append(run(path))
    assert not any(prepared.cached for prepared in made)


def test_ragged_ranges_count_up_from_each_start() -> None:
    starts, counts = np.array([5, 20, 7, 0]), np.array([3, 0, 2, 1])
    expected = [start + step for start, count in zip(starts, counts, strict=True) for step in range(count)]
    assert ragged_ranges(starts, counts).tolist() == expected
    assert ragged_ranges(starts[:0], counts[:0]).tolist() == []


def test_a_fingerprint_is_that_of_the_samples_alone(run: Prepare, tmp_path: Path) -> None:
    rows = [chat(n) for n in range(5)]
    first = run(write(tmp_path / "a.jsonl", rows)).train
    (tmp_path / "moved").mkdir()
    moved = run(write(tmp_path / "moved" / "b.jsonl", rows))
    assert not moved.cached
    assert moved.train.fingerprint == first.fingerprint == SampleStore.from_pairs(pairs(first)).fingerprint
    other_order, other_text, two_turns = write(tmp_path / "c.jsonl", rows[::-1]), [*rows[:4], chat(7)], [rows[0]] * 2
    others = [
        run(other_order),
        run(write(tmp_path / "d.jsonl", other_text)),
        run(write(tmp_path / "e.jsonl", two_turns)),
    ]
    others.append(run(tmp_path / "a.jsonl", train_on="all"))
    assert len({first.fingerprint, *(prepared.train.fingerprint for prepared in others)}) == 5
    ids, labels = [1, 2, 3, 4], [-100, 2, -100, 4]
    one, two = [(ids, labels)], [(ids[:2], labels[:2]), (ids[2:], labels[2:])]
    assert SampleStore.from_pairs(one).fingerprint != SampleStore.from_pairs(two).fingerprint


SAMPLES_BY_VALUE = {
    "config": "bounds of options, which are in the key by value",
    "errors": "none",
    "ops": "the ignore index, in the key",
    "runs": "where the cache is, writing JSON",
}
"""Packages outside of ``data`` that preparation imports, and what of them reaches samples."""


def test_the_key_of_the_cache_depends_on_every_module_that_prepare_imports() -> None:
    code = "import sys, lightning_hub.data.prepare; print(*[n for n in sys.modules if n.startswith('lightning_hub.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[1] for name in loaded} == {"data", *SAMPLES_BY_VALUE}
    inside = {sys.modules.get(name) or import_module(name) for name in loaded if name.startswith("lightning_hub.data.")}
    files = {Path(str(module.__file__)) for module in inside}
    assert files - set(cache.files_that_make_samples()) == {Path(cache.__file__)}


def test_a_module_that_is_left_out_of_the_key_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cache.MAKES_SAMPLES:
        with monkeypatch.context() as patched:
            patched.setattr(cache, "MAKES_SAMPLES", tuple(other for other in cache.MAKES_SAMPLES if other != name))
            with pytest.raises(AssertionError):
                test_the_key_of_the_cache_depends_on_every_module_that_prepare_imports()


def test_the_code_version_changes_with_any_file_of_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(Path(cache.__file__).parent, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "_FOLDER", tmp_path / "data")
    versions = [cache.code_version()]
    for name in ("masking/reference.py", "readers/new.py", "readers/deeper/new.py", "encode.py"):
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("changed = True\n")
        versions.append(cache.code_version())
    assert len(set(versions)) == 5
    (tmp_path / "data" / "step_plan.py").write_text("changed = True\n")
    assert cache.code_version() == versions[-1]


def test_a_damaged_entry_is_made_anew(run: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(n) for n in range(5)])
    before = pairs(run(path).train)
    (ids,) = tmp_path.glob("cache/data/*/train/ids")
    ids.write_bytes(ids.read_bytes()[:-4])
    again = run(path)
    assert not again.cached
    assert pairs(again.train) == before


def test_other_processes_wait_for_the_one_that_prepares(
    run: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [chat(n) for n in range(5)])
    run(path)
    (entry,) = (found for found in (tmp_path / "cache/data").iterdir() if found.is_dir())
    (entry / "reports.json").unlink()
    hold = (
        f"import sys, filelock; lock = filelock.FileLock({f'{entry}.lock'!r}); lock.acquire();"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    said: list[str] = []

    def kill(message: str) -> None:
        said.append(message)
        holder.kill()

    again = prepare(DataSettings(str(path)), tokenizer, cache_dir=tmp_path / "cache", notify=kill)
    holder.communicate()
    assert (len(again.train), again.cached) == (5, False)
    assert said == ["another process prepares the same data; waiting for it"]


def test_a_cache_that_cannot_be_written_says_so(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(1)])
    with pytest.raises(ConfigError, match="LIGHTNING_HUB_CACHE"):
        prepare(DataSettings(str(path)), tokenizer, cache_dir=path)


@pytest.mark.fault("F34")
def test_bad_rows_are_errors_with_their_places_and_the_option(run: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(1), *["{"] * 30, {"messages": 3}, chat(2)])
    with pytest.raises(DataError) as raised:
        run(path)
    shown = str(raised.value)
    assert all(f"{path}:{line}: not JSON" in shown for line in range(2, 22))
    assert f"{path}:22" not in shown
    assert "data.init_args.on_bad: skip" in shown
    report = run(path, on_bad="skip").report
    assert (report.rows_read, report.rows_kept, report.dropped) == (33, 2, {"unreadable": 30, "refused": 1})


@pytest.mark.fault("F35")
def test_rows_without_a_trained_token(run: Prepare, tmp_path: Path) -> None:
    empty = {"messages": [{"role": "user", "content": "only a question"}]}
    path = write(tmp_path / "a.jsonl", [empty, *(chat(n) for n in range(100))])
    report = run(path).report
    assert (report.fully_masked, report.dropped) == (1, {"no trained token": 1})
    write(path, [empty, empty, *(chat(n) for n in range(100))])
    with pytest.raises(
        DataError, match=r"2 of 102 examples, more than 1 %.*on_bad: skip:\n.*a\.jsonl:1\n.*a\.jsonl:2$"
    ):
        run(path)
    assert run(path, on_bad="skip").report.fully_masked == 2
    write(path, [empty])
    with pytest.raises(DataError, match="there is no example to train on: 1 no trained token"):
        run(path, on_bad="skip")


@pytest.mark.fault("F36")
def test_long_rows(run: Prepare, tmp_path: Path) -> None:
    question = {"role": "user", "content": "q " * 100}
    lost = {"messages": [question, {"role": "assistant", "content": "a"}]}
    path = write(tmp_path / "a.jsonl", [*(chat(n) for n in range(200)), chat(3, "fox " * 50), lost])
    with pytest.raises(DataError, match=r"truncate or drop:\n.*a\.jsonl:201: 87 tokens, the maximum is 60\n.*:202: "):
        run(path, max_seq_len=60)
    dropped = run(path, max_seq_len=60, on_long="drop").report
    assert (dropped.rows_kept, dropped.dropped) == (200, {"too long": 2})
    cut = run(path, max_seq_len=60, on_long="truncate")
    full = run(path, max_seq_len=1000)
    assert (cut.report.truncated, cut.report.dropped) == (2, {"no trained token": 1})
    assert cut.report.tokens_lost == (full.train.lengths[200:] - 60).sum()
    assert cut.train[200][0].tolist() == full.train[200][0][:60].tolist()


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_empty_data_is_an_error(run: Prepare, tmp_path: Path, content: str) -> None:
    path = tmp_path / ("a.json" if content == "[]" else "a.jsonl")
    path.write_text(content)
    with pytest.raises(DataError, match="there is no example to train on: the input is empty"):
        run(path)


def test_a_share_is_set_aside_by_seed_and_by_whole_rows(
    run: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    two = [chat(n) for n in range(40)]
    for row in two:
        row["messages"] = [*row["messages"], *row["messages"]]  # type: ignore[misc]
    path = write(tmp_path / "a.jsonl", two)
    prepared = run(path, val=0.25, expand_turns=True)
    assert prepared.val is not None
    assert prepared.val_report is not None
    assert (len(prepared.train), len(prepared.val)) == (60, 20)
    first = {text.split("question ")[1].split("<")[0] for text in texts(prepared.train, tokenizer)}
    second = {text.split("question ")[1].split("<")[0] for text in texts(prepared.val, tokenizer)}
    assert not first & second
    assert len(first | second) == 40
    assert (prepared.report.set_aside, prepared.val_report.rows_read) == (10, 10)
    other = run(path, val=0.25, expand_turns=True, seed=7)
    assert other.val is not None
    assert pairs(other.val) != pairs(prepared.val)


def test_a_weight_is_how_often_a_row_is_seen(run: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    half = write(tmp_path / "half.jsonl", [chat(n, "half") for n in range(10)])
    more = write(tmp_path / "more.jsonl", [chat(n, "more") for n in range(10)])
    prepared = run([Source(str(half), weight=0.5), Source(str(more), weight=2.3)])
    seen = texts(prepared.train, tokenizer)
    assert sum("half" in text for text in seen) == 5
    times = [sum(f"more {n}<" in text for text in seen) for n in range(10)]
    assert sorted(times) == [2] * 7 + [3] * 3
    assert (prepared.report.rows_read, prepared.report.rows_kept) == (20, 15)
    assert prepared.report.dropped == {"not chosen": 5}


def test_threads_change_nothing(run: Prepare, tmp_path: Path) -> None:
    rows = [chat(n, "fox " * (n % 7 + 1)) for n in range(700)]
    path = write(tmp_path / "a.jsonl", [*rows[:300], {"messages": [{"role": "user", "content": "x"}]}, *rows[300:]])
    one = run(path)
    (tmp_path / "cache").rename(tmp_path / "other")
    three = run(path, num_proc=3)
    assert not three.cached
    assert pairs(one.train) == pairs(three.train)
    assert one.report == three.report


def test_documents_train_every_token_once(run: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "the quick brown fox " * 30
    path = write(tmp_path / "a.jsonl", [{"text": text}, {"text": "short"}])
    prepared = run(path, max_seq_len=16)
    whole = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    pieces = pairs(prepared.train)[:-1]
    assert max(len(ids) for ids, _ in pieces) == 16
    assert [label for _, labels in pieces for label in labels if label != IGNORE_INDEX] == whole[1:]
    assert [ids[0] for ids, _ in pieces[1:]] == [ids[-1] for ids, _ in pieces[:-1]]
    assert texts(prepared.train, tokenizer)[-1] == "short<|im_end|>"


def test_tokenised_rows_are_taken_as_they_are(run: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}])
    assert pairs(run(path).train) == [([5, 6, 7], [-100, -100, 7])]
    write(path, [{"input_ids": [5, 10**6]}])
    with pytest.raises(DataError, match="input_ids reach from 5 to 1000000; the tokenizer has"):
        run(path)


def test_a_saved_dataset_a_folder_and_a_pattern_are_the_same_rows(run: Prepare, tmp_path: Path) -> None:
    rows = [chat(n) for n in range(6)]
    expected = pairs(run(write(tmp_path / "a.jsonl", rows)).train)
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "1.jsonl", rows[:3])
    write(folder / "2.jsonl", rows[3:])
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "saved"))
    for train in (folder, tmp_path / "folder" / "*.jsonl", tmp_path / "saved"):
        assert pairs(run(train).train) == expected
    with pytest.raises(ConfigError, match="no split 'test'; there are train"):
        run([Source(str(tmp_path / "saved"), split="test")])


def test_an_input_that_is_missing_is_reported_under_its_own_option(run: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(n) for n in range(5)])
    (tmp_path / "a.xyz").touch()
    for missing in ("nothing.jsonl", "a.xyz", "*.csv"):
        with pytest.raises(InputError) as raised:
            run(tmp_path / missing)
        assert raised.value.where == "data.init_args.train"
        with pytest.raises(InputError) as raised:
            run(path, val=str(tmp_path / missing))
        assert raised.value.where == "data.init_args.val"


def test_what_is_not_there_is_said(run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        run(tmp_path / "nothing.jsonl")
    with pytest.raises(ConfigError, match="holds no data file"):
        run(tmp_path)


@pytest.mark.slow
def test_the_hub_offline_is_a_clear_error(tmp_path: Path) -> None:
    code = (
        "from lightning_hub.data.readers.sources import open_source\n"
        "from lightning_hub.data.settings import Source\n"
        "open_source(Source('someone/something'))"
    )
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PATH": "/usr/bin",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ConfigError: someone/something: neither a path here nor a dataset" in done.stderr
    assert "offline mode is on" in done.stderr


KINDS: dict[str, object] = {
    "good": chat(1),
    "masked": {"messages": [{"role": "user", "content": "q"}]},
    "long": chat(2, "fox " * 99),
    "bad": "{",
    "refused": {"messages": [{"role": "cat", "content": "c"}]},
    "two": {"messages": [*chat(1)["messages"], *chat(2)["messages"]]},  # type: ignore[misc]
}


@pytest.mark.slow
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=25),
    st.sampled_from(["drop", "truncate"]),
    st.booleans(),
    st.sampled_from([0.5, 1.0, 1.5]),
    st.sampled_from([None, 0.3]),
)
def test_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    kinds: list[str],
    on_long: OnLong,
    expand: bool,
    weight: float,
    val: float | None,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    path = write(folder / "a.jsonl", [KINDS[kind] for kind in ["two", *kinds]])
    settings = DataSettings(
        [Source(str(path), weight=weight)],
        val,
        max_seq_len=60,
        on_long=on_long,
        on_bad="skip",
        expand_turns=expand,
    )
    try:
        prepared = prepare(settings, tokenizer, cache_dir=folder / "cache")
    except BadExamplesError:
        raise  # skip and drop are set: no single row may stop it
    except DataError:
        return  # nothing was left of this input
    report = prepared.report
    assert report.rows_read == len(kinds) + 1 == report.rows_kept + sum(report.dropped.values())
    assert report.tokens == sum(report.tokens_by_role.values()) == len(prepared.train.ids)
    assert report.trained_tokens == int((np.asarray(prepared.train.labels) != IGNORE_INDEX).sum())
    assert sum(report.length_histogram.values()) == report.samples == len(prepared.train)
    assert set(np.asarray(prepared.train.labels)[prepared.train.offsets[:-1]]) == {IGNORE_INDEX}


def test_the_report_file(run: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(n) for n in range(10)])
    run(path, val=0.2).write_report(tmp_path / "data_report.json", packing={"fill": 1.0})
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["inputs"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    assert report["packing"] == {"fill": 1.0}
    assert (report["rows_read"], report["val"]["rows_read"]) == (10, 2)


def test_what_a_template_drops_is_named_with_its_rows(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(
        (TEMPLATES / "llama3.jinja").read_text(encoding="utf-8"), "<|begin_of_text|>", "<|eot_id|>"
    )
    thinking = chat(1)
    thinking["messages"][1]["reasoning_content"] = "hm"  # type: ignore[index]
    path = write(tmp_path / "a.jsonl", [chat(0), thinking])
    report = prepare(DataSettings(str(path)), tokenizer, cache_dir=tmp_path / "cache").report
    assert report.notes == {"thoughts dropped": 1, "thoughts dropped, characters": 2}
    assert report.places == {"thoughts dropped": [f"{path}:2"]}
