"""The fast way gives the reference's ids and labels, or leaves the row to it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hub.data.conversation import Conversation, Message, Refused
from lightning_hub.data.encode import Encoder, to_sample
from lightning_hub.data.masking.pattern_cache import AGREEING_EXAMPLES
from lightning_hub.data.settings import DataSettings
from tests.data.template_families import FAMILIES, Family

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over\n",
    "lazy",
    "dog,",
    "",
    "it",
    "sleeps.",
    "ä",
    "\n\n",
    "12",
    "漢",
]
HOSTILE = ("<|im_end|>", "<|im_start|>assistant\n", "[/INST]", "</s>", "<think>", " ", "<end_of_turn>", "<|user|>")


def conversation(random_: random.Random, hostile: float = 0.0) -> Conversation:
    def text() -> str:
        words = random_.choices(WORDS, k=random_.randint(1, 8))
        if random_.random() < hostile:
            words.insert(random_.randint(0, len(words)), random_.choice(HOSTILE))
        return " ".join(words)

    turns = [Message(role, text()) for _ in range(random_.randint(1, 3)) for role in ("user", "assistant")]
    return Conversation(tuple(turns))


def encoder_of(family: Family) -> Encoder:
    tokenizer = family.tokenizer()
    return Encoder(DataSettings("unused"), tokenizer, family.stop_ids(tokenizer))


def assert_same(encoder: Encoder, rows: list[Conversation]) -> int:
    """Encode rows in batches; return how many went the fast way."""
    quick = 0
    for start in range(0, len(rows), 20):
        batch = rows[start : start + 20]
        patterns = [encoder.pattern_masker.roles_of(row) for row in batch]
        plain = [(row, roles) for row, roles in zip(batch, patterns, strict=True) if roles]
        quick += (
            sum(found is not None for found in encoder.pattern_masker(*map(list, zip(*plain, strict=True))))
            if plain
            else 0
        )
        for row, result in zip(batch, encoder.encode(batch), strict=True):
            assert not isinstance(result, Refused), result
            expected = to_sample(encoder.reference_masker(row))
            assert np.array_equal(result[0].ids, expected.ids)
            assert np.array_equal(result[0].labels, expected.labels)
            assert (result[0].num_trained, result[0].by_role) == (expected.num_trained, expected.by_role)
            assert (result[0].text, result[0].notes) == (expected.text, expected.notes)
    return quick


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.name}-{family.eos}")
def test_fast_is_the_reference_for_every_family(family: Family) -> None:
    random_ = random.Random(family.name)
    rows = [conversation(random_, hostile=0.0 if number < 80 else 0.3) for number in range(160)]
    quick = assert_same(encoder_of(family), rows)
    assert (quick > 10) == (family.name not in ("glm4", "glm45", "bare", "idefics"))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_hostile_rows_never_get_another_mask(random_: random.Random) -> None:
    rows = [conversation(random_, hostile=random_.choice([0.0, 0.5, 1.0])) for _ in range(40)]
    assert_same(CHATML, rows)


CHATML = encoder_of(FAMILIES[0])


def test_rows_that_disagree_switch_the_fast_way_off_for_their_shape() -> None:
    encoder = encoder_of(FAMILIES[0])
    row = Conversation((Message("user", "the fox"), Message("assistant", "it sleeps")))
    roles = encoder.pattern_masker.roles_of(row)
    assert roles
    masked = encoder.reference_masker(row)
    for _ in range(AGREEING_EXAMPLES):
        assert encoder.pattern_masker([row], [roles]) == [None]
        encoder.pattern_masker.learn(roles, masked)
    assert encoder.pattern_masker([row], [roles]) != [None]
    masked.trained = [(masked.trained[0][0] - 1, masked.trained[0][1])]
    encoder.pattern_masker.learn(roles, masked)
    assert encoder.pattern_masker([row], [roles]) == [None]
