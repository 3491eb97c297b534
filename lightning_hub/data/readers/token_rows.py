"""Reads examples that were tokenised elsewhere: ``input_ids`` and the columns next to it.

Padding is removed and masks decide what is trained. An example with several documents is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_hub.data.conversation import BadExampleError, Tokens
from lightning_hub.ops.batch import IGNORE_INDEX

LOSS_MASKS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")
"""Columns with 1 for a trained token, else 0; a token is trained if it has 1 in all of them."""

POSITION_COLUMNS = ("position_ids",)
LENGTH_COLUMNS = ("seq_lengths", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens")
SEGMENT_COLUMNS = ("seq_idx", "sequence_ids", "document_ids", "segment_ids")

COLUMNS = frozenset(
    ("input_ids", "labels", "attention_mask", "token_type_ids", "special_tokens_mask",
     *LOSS_MASKS, *POSITION_COLUMNS, *LENGTH_COLUMNS, *SEGMENT_COLUMNS)
)  # fmt: skip


def parse_tokens(fields: Mapping[str, object]) -> Tokens:
    """Read one example of token ids.

    Raises:
        BadExampleError: The columns do not fit together.
    """
    ids = _integers(fields.get("input_ids"), "input_ids")
    if not ids:
        raise BadExampleError("input_ids is empty")
    labels = _labels(fields, ids)
    remarks = []
    for name in LOSS_MASKS:
        if fields.get(name) is not None:
            mask = _bits(fields[name], name, len(ids))
            labels = tuple(label if bit else IGNORE_INDEX for label, bit in zip(labels, mask, strict=True))
    if fields.get("attention_mask") is not None:
        start, end = _without_padding(_bits(fields["attention_mask"], "attention_mask", len(ids)))
        if end - start < len(ids):
            remarks.append("padding removed from token rows")
        ids, labels = ids[start:end], labels[start:end]
    else:
        start, end = 0, len(ids)
    _check_one_document(fields, start, end)
    types = fields.get("token_type_ids")
    if types is not None and any(_integers(types, "token_type_ids")):
        remarks.append("column token_type_ids is not read")
    return Tokens(ids, labels, tuple(remarks))


def _labels(fields: Mapping[str, object], ids: tuple[int, ...]) -> tuple[int, ...]:
    if fields.get("labels") is None:
        return ids
    labels = _integers(fields["labels"], "labels")
    if len(ids) != len(labels):
        raise BadExampleError(f"{len(ids)} input_ids but {len(labels)} labels")
    if any(label not in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True)):
        raise BadExampleError(
            f"each label must be {IGNORE_INDEX} or the token at the same position (labels are not shifted)"
        )
    return labels


def _without_padding(mask: tuple[int, ...]) -> tuple[int, int]:
    """Begin and end of the tokens that are not padding."""
    if 1 not in mask:
        raise BadExampleError("attention_mask is 0 everywhere: there is padding only")
    start, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[start:end]:
        hole = mask.index(0, start)
        raise BadExampleError(f"attention_mask has 0 between 1s (at {hole}); only padding at the ends can be removed")
    return start, end


def _check_one_document(fields: Mapping[str, object], start: int, end: int) -> None:
    """Refuse an example whose positions, lengths or segments describe several documents."""
    for name in POSITION_COLUMNS:
        if fields.get(name) is not None:
            given = _integers(fields[name], name)
            counted = given[start:end]
            if counted != tuple(range(end - start)) and given != tuple(range(len(given))):
                raise BadExampleError(f"{name} do not count up from 0; give each document as its own example")
    for name in LENGTH_COLUMNS:
        if fields.get(name) is not None and len(_integers(fields[name], name)) > 1 + name.startswith("cu_"):
            raise BadExampleError(f"{name} describes several documents; give each as its own example")
    for name in SEGMENT_COLUMNS:
        if fields.get(name) is not None and len(set(_integers(fields[name], name)[start:end])) > 1:
            raise BadExampleError(f"{name} describes several documents; give each as its own example")


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
        given = "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise BadExampleError(f"{column} must be a list, not {given}")
    if not all(type(number) is int for number in value):
        raise BadExampleError(f"{column} must hold whole numbers only")
    return tuple(value)
