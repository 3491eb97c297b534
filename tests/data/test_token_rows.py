"""Rows that were tokenised elsewhere: padding, masks and positions beside the ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_hub.data.conversation import BadExampleError
from lightning_hub.data.prepare import prepare
from lightning_hub.data.readers.token_rows import LOSS_MASKS, parse_tokens
from lightning_hub.data.settings import DataSettings
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.batch import IGNORE_INDEX

REMOVED = ("padding removed from token rows",)


def test_padding_is_no_part_of_the_loss(tmp_path: Path) -> None:
    padded = {
        "input_ids": [0, 0, 0, 0, 10, 11, 12, 1],
        "attention_mask": [0, 0, 0, 0, 1, 1, 1, 1],
        "labels": [-100, -100, -100, -100, -100, 11, 12, 1],
    }
    right = {key: value[4:] + value[:4] for key, value in padded.items()}
    unlabelled = {key: value for key, value in padded.items() if key != "labels"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (padded, right, unlabelled)))
    pretrained = Pretrained("demo")
    prepared = prepare(DataSettings(str(path)), pretrained.tokenizer, cache_dir=tmp_path / "cache")
    model = pretrained.load(dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([padded["input_ids"]])
    by_library = model(
        ids, attention_mask=torch.tensor([padded["attention_mask"]]), labels=torch.tensor([padded["labels"]])
    )
    for index in range(3):
        sample, labels = prepared.train[index]
        assert sample.tolist() == [10, 11, 12, 1]
        assert labels.tolist() == [IGNORE_INDEX, 11, 12, 1]
        loss = model(torch.tensor(sample)[None].long(), labels=torch.tensor(labels)[None].long()).loss
        assert float(loss) == pytest.approx(8.4620, abs=1e-3)
        assert float(loss) == pytest.approx(float(by_library.loss), abs=1e-4)
    assert prepared.report.notes[REMOVED[0]] == 3


IDS = {"input_ids": [9, 5, 6, 7]}


@pytest.mark.parametrize("name", LOSS_MASKS)
def test_masks_decide_what_is_trained(name: str) -> None:
    assert parse_tokens(IDS | {name: [0, 0, 1, 1]}).labels == (IGNORE_INDEX, IGNORE_INDEX, 6, 7)
    assert parse_tokens(IDS | {name: [False, False, True, True]}).labels == (IGNORE_INDEX, IGNORE_INDEX, 6, 7)
    both = IDS | {name: [0, 1, 1, 0], "labels": [IGNORE_INDEX, IGNORE_INDEX, 6, 7]}
    assert parse_tokens(both).labels == (IGNORE_INDEX, IGNORE_INDEX, 6, IGNORE_INDEX)
    padded = IDS | {name: [0, 1, 1, 0], "attention_mask": [0, 1, 1, 1]}
    assert parse_tokens(padded).labels == (5, 6, IGNORE_INDEX)


def test_two_masks_train_what_both_allow() -> None:
    row = IDS | {"completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 1, 0, 1]}
    assert parse_tokens(row).labels == (IGNORE_INDEX, 5, IGNORE_INDEX, 7)


@pytest.mark.parametrize(
    "row",
    [
        {"position_ids": [0, 1, 2, 3]},
        {"attention_mask": [1, 1, 1, 1], "token_type_ids": [0, 0, 0, 0], "seq_lengths": [4], "seq_idx": [0, 0, 0, 0]},
        {"cu_seqlens": [0, 4], "document_ids": [7, 7, 7, 7]},
    ],
)
def test_columns_that_say_nothing_new_change_nothing(row: dict[str, object]) -> None:
    assert parse_tokens(IDS | row) == parse_tokens(IDS)


@pytest.mark.parametrize("positions", [[0, 0, 0, 1], [1, 1, 0, 1], [0, 1, 2, 3]])
def test_positions_of_padding_are_padding(positions: list[int]) -> None:
    found = parse_tokens(IDS | {"attention_mask": [0, 0, 1, 1], "position_ids": positions})
    assert (found.ids, found.labels) == ((6, 7), (6, 7))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"attention_mask": [1, 0, 1, 1]}, r"attention_mask has 0 between 1s \(at 1\)"),
        ({"attention_mask": [0, 0, 0, 0]}, "there is padding only"),
        ({"attention_mask": [1, 1, 1]}, "4 input_ids but 3 of attention_mask"),
        ({"attention_mask": [1, 1, 2, 1]}, "attention_mask must hold 0 and 1 only"),
        ({"attention_mask": [1.0, 1.0, 1.0, 1.0]}, "0 and 1 only"),
        ({"attention_mask": [[1], [1], [1], [1]]}, "0 and 1 only"),
        ({"attention_mask": 1}, "attention_mask must be a list"),
        ({"loss_mask": [1, 1]}, "2 of loss_mask"),
        ({"completion_mask": [0, 0.5, 1, 1]}, "completion_mask must hold 0 and 1"),
        ({"position_ids": [0, 1, 0, 1]}, "position_ids do not count up from 0"),
        ({"position_ids": [5, 6, 7, 8]}, "position_ids do not count up from 0"),
        ({"seq_lengths": [2, 2]}, "seq_lengths describes several documents"),
        ({"cu_seqlens": [0, 2, 4]}, "cu_seqlens describes several documents"),
        ({"seq_idx": [0, 0, 1, 1]}, "seq_idx describes several documents"),
        ({"token_type_ids": "no"}, "token_type_ids must be a list"),
        ({"labels": [9, 5, 6]}, "4 input_ids but 3 labels"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(row: dict[str, object], said: str) -> None:
    with pytest.raises(BadExampleError, match=said):
        parse_tokens(IDS | row)


def test_types_of_tokens_are_named_as_not_read() -> None:
    assert parse_tokens(IDS | {"token_type_ids": [0, 0, 1, 1]}).remarks == ("column token_type_ids is not read",)
