"""Rows that were tokenised elsewhere, with the columns that stand beside ``input_ids``.

Padding goes, masks decide what is trained, and what says that several documents stand in one row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_hub.data.conversation import BadExampleError, Tokens
from lightning_hub.ops.rows import IGNORED

LOSS_MASKS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")
"""Columns with 1 where a token is trained and 0 where it is not; a token is trained where all of them say so."""

POSITION_COLUMNS = ("position_ids",)
LENGTH_COLUMNS = ("seq_lengths", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens")
SEGMENT_COLUMNS = ("seq_idx", "sequence_ids", "document_ids", "segment_ids")

COLUMNS = frozenset(
    ("input_ids", "labels", "attention_mask", "token_type_ids", "special_tokens_mask",
     *LOSS_MASKS, *POSITION_COLUMNS, *LENGTH_COLUMNS, *SEGMENT_COLUMNS)
)  # fmt: skip


def parse_tokens(row: Mapping[str, object]) -> Tokens:
    """Read one row of token ids.

    Raises:
        BadExampleError: The columns do not fit together.
    """
    ids = _integers(row.get("input_ids"), "input_ids")
    if not ids:
        raise BadExampleError("input_ids is empty")
    labels = _labels(row, ids)
    remarks = []
    for name in LOSS_MASKS:
        if row.get(name) is not None:
            mask = _bits(row[name], name, len(ids))
            labels = tuple(label if bit else IGNORED for label, bit in zip(labels, mask, strict=True))
    if row.get("attention_mask") is not None:
        start, end = _without_padding(_bits(row["attention_mask"], "attention_mask", len(ids)))
        if end - start < len(ids):
            remarks.append("padding removed from token rows")
        ids, labels = ids[start:end], labels[start:end]
    else:
        start, end = 0, len(ids)
    _check_one_document(row, start, end)
    types = row.get("token_type_ids")
    if types is not None and any(_integers(types, "token_type_ids")):
        remarks.append("column token_type_ids is not read")
    return Tokens(ids, labels, tuple(remarks))


def _labels(row: Mapping[str, object], ids: tuple[int, ...]) -> tuple[int, ...]:
    if row.get("labels") is None:
        return ids
    labels = _integers(row["labels"], "labels")
    if len(ids) != len(labels):
        raise BadExampleError(f"{len(ids)} input_ids but {len(labels)} labels")
    if any(label not in (IGNORED, token) for token, label in zip(ids, labels, strict=True)):
        raise BadExampleError(f"each label must be {IGNORED} or the token at its own place (labels are not shifted)")
    return labels


def _without_padding(mask: tuple[int, ...]) -> tuple[int, int]:
    """Where the tokens that are no padding begin and end."""
    if 1 not in mask:
        raise BadExampleError("attention_mask is 0 everywhere: the row holds padding only")
    start, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[start:end]:
        hole = mask.index(0, start)
        raise BadExampleError(f"attention_mask has 0 between 1s (at {hole}); only padding at the ends can be removed")
    return start, end


def _check_one_document(row: Mapping[str, object], start: int, end: int) -> None:
    """Refuse a row whose positions, lengths or segments tell of more than one document."""
    for name in POSITION_COLUMNS:
        if row.get(name) is not None:
            given = _integers(row[name], name)
            counted = given[start:end]
            if counted != tuple(range(end - start)) and given != tuple(range(len(given))):
                raise BadExampleError(f"{name} do not count up from 0; give each document as a row of its own")
    for name in LENGTH_COLUMNS:
        if row.get(name) is not None and len(_integers(row[name], name)) > 1 + name.startswith("cu_"):
            raise BadExampleError(f"{name} tells of several documents; give each as a row of its own")
    for name in SEGMENT_COLUMNS:
        if row.get(name) is not None and len(set(_integers(row[name], name)[start:end])) > 1:
            raise BadExampleError(f"{name} tells of several documents; give each as a row of its own")


def _bits(value: object, column: str, length: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise BadExampleError(f"{column} must be a list, not {type(value).__name__}")
    if len(value) != length:
        raise BadExampleError(f"{length} input_ids but {len(value)} of {column}")
    if not all(type(bit) in (int, bool) and bit in (0, 1) for bit in value):
        raise BadExampleError(f"{column} must hold 0 and 1 only")
    return tuple(map(int, value))


def _integers(value: object, column: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        said = "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise BadExampleError(f"{column} must be a list, not {said}")
    if not all(type(number) is int for number in value):
        raise BadExampleError(f"{column} must hold whole numbers only")
    return tuple(value)
