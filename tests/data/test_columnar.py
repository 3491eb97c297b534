"""A row is the same from every kind of file: struct columns give no row the keys of others."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_hub.data.readers.sources import open_source
from lightning_hub.data.settings import Source
from lightning_hub.errors import ConfigError
from tests.data.template_families import TEMPLATES, make_tokenizer
from tests.data.test_prepare import Prepare, pairs, run, tokenizer, write

__all__ = ["run", "tokenizer"]


def call(name: str, arguments: dict[str, object]) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, properties: dict[str, object], **more: object) -> dict[str, object]:
    parameters = {"type": "object", "properties": properties, **more}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


DEEP: dict[str, object] = {"y": {"z": "s"}, "deep": [{"a": 1}, {"b": "c"}]}

ROWS: list[dict[str, object]] = [
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call("f", {"x": 1})]},
            {"role": "tool", "content": "ok", "name": "f"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [tool("f", {"x": {"type": "integer", "minimum": 0}}, required=["x"])],
    },
    {
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call("g", DEEP)],
            },
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        ],
        "tools": [tool("g", {"y": {"type": "object"}}), tool("h", {"z": {"enum": ["s"], "type": "string"}})],
    },
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": []},
]


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Path]:
    """The same rows in every columnar form."""
    names = {kind: tmp_path / kind for kind in ("a.jsonl", "a.parquet", "saved", "dict", "shards")}
    write(names["a.jsonl"], ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), names["a.parquet"])
    datasets.Dataset.from_list(ROWS).save_to_disk(str(names["saved"]))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(names["dict"]))
    names["shards"].mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), names["shards"] / "train-00000.parquet", row_group_size=1)
    return names


def test_rows_of_columnar_files_are_those_of_json_lines(stored: dict[str, Path]) -> None:
    for name, path in stored.items():
        found = [row.data for row in open_source(Source(str(path))).examples()]
        assert found == ROWS, name


def test_samples_of_columnar_files_are_those_of_json_lines(stored: dict[str, Path], run: Prepare) -> None:
    expected = run(stored["a.jsonl"])
    assert "null" not in json.dumps(pairs(expected.train))
    for path in stored.values():
        prepared = run(path)
        assert pairs(prepared.train) == pairs(expected.train)
        assert prepared.report.notes == expected.report.notes


def test_no_null_reaches_the_text(stored: dict[str, Path], run: Prepare) -> None:
    source = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    shown = make_tokenizer(source).decode(run(stored["a.parquet"]).train.ids.tolist())
    assert '{"x": 1}' in shown
    assert "null" not in shown
    assert "None" not in shown


def test_nulls_in_lists_and_maps_stay(tmp_path: Path) -> None:
    kind = pa.struct({"items": pa.list_(pa.int64()), "map": pa.map_(pa.string(), pa.int64()), "gone": pa.string()})
    value = {"items": [1, None], "map": [("a", None), ("b", 1)], "gone": None}
    pq.write_table(pa.table({"text": ["t"], "more": pa.array([value], kind)}), tmp_path / "a.parquet")
    (row,) = open_source(Source(str(tmp_path / "a.parquet"))).examples()
    assert row.data == {"text": "t", "more": {"items": [1, None], "map": {"a": None, "b": 1}}}


def test_what_lies_beside_data_is_no_document(tmp_path: Path, run: Prepare) -> None:
    folder = tmp_path / "folder"
    (folder / "images").mkdir(parents=True)
    write(folder / "train.jsonl", ROWS[:1])
    (folder / "notes.md").write_text("a document of its own")
    others = ["README.md", "LICENSE", "LICENSE.txt", "dataset_infos.json", "CITATION.cff", "readme_de.md", "rows.xml"]
    for name in [*others, ".gitattributes", ".hidden.jsonl"]:
        (folder / name).write_text('{"text": "the fox"}')
    given = open_source(Source(str(folder)))
    assert [Path(row.where.rpartition(":")[0]).name for row in given.examples()] == ["notes.md", "train.jsonl"]
    assert given.not_read == tuple(sorted([*others, "images"]))
    assert open_source(Source(str(folder / "*.md"))).not_read == ("README.md", "readme_de.md")
    (folder / "notes.md").unlink()
    report = run(folder).report
    assert report.notes["files that are no data are not read"] == 8
    assert f"{'README.md'}" in report.places["files that are no data are not read"]
    (tmp_path / "clone" / "data").mkdir(parents=True)
    write(tmp_path / "clone" / "data" / "train.jsonl", ROWS[:1])
    (tmp_path / "clone" / "README.md").write_text("about")
    with pytest.raises(ConfigError, match=r"holds no data file; name the folder .*clone/data"):
        open_source(Source(str(tmp_path / "clone")))
    alone = open_source(Source(str(folder / "README.md")))
    assert len(list(alone.examples())) == 1, "a file that is named is read"


def test_a_first_row_without_an_answer_is_refused_by_name(tmp_path: Path, run: Prepare) -> None:
    good = [{"prompt": "q", "completion": "a"}] * 3
    for first in ({"prompt": "q", "completion": None}, {"prompt": "q"}, {"prompt": None, "completion": "a"}):
        path = write(tmp_path / "a.jsonl", [first, *good])
        with pytest.raises(Exception, match=r"a\.jsonl:1: (completion|prompt) must be .*null or missing"):
            run(path)
        report = run(path, on_bad="skip").report
        assert (report.rows_kept, report.dropped) == (3, {"refused": 1})


def test_what_is_not_read_is_counted_with_its_rows(tmp_path: Path, run: Prepare) -> None:
    rows = [{"prompt": "q", "completion": "a" * n, "id": n} for n in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    report = run(path, columns={"system": "sytem"}).report
    assert report.notes == {
        "column id is not read": 3,
        "empty answers": 1,
        "column 'sytem' of data.columns is in no row": 1,
    }
    assert report.places["empty answers"] == [f"{path}:1"]
