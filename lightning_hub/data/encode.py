"""Encodes examples in the normal form as token ids and labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_hub.data.conversation import BadExampleError, Conversation, Document, Example, Refused, Role, Tokens
from lightning_hub.data.masking.chat_template import Renderer, resolve_template
from lightning_hub.data.masking.pattern_cache import PatternMasked, PatternMasker
from lightning_hub.data.masking.reference import MaskedConversation, ReferenceMasker
from lightning_hub.data.masking.selection import expand
from lightning_hub.data.masking.template_profile import Backend, backend_of, profile_template
from lightning_hub.data.sample_store import Ids
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import ConfigError
from lightning_hub.ops.batch import IGNORE_INDEX

ROLES: tuple[str, ...] = (*get_args(Role), "template", "document", "tokens")
"""Tokens are counted by role; ``template`` is what a template writes between texts, the last two have no roles."""


_ROLE_NUMBER = {role: number for number, role in enumerate(ROLES)}


@dataclass(slots=True)
class Sample:
    """One sample before it is stored.

    Attributes:
        ids: Token ids, int32, shape ``(tokens,)``.
        labels: The id where a token is trained, else ``IGNORE_INDEX``, int32, the same shape.
        num_trained: Trained tokens.
        by_role: Tokens of each of ``ROLES``.
        notes: Counted remarks, such as what the template dropped.
        text: The rendering, for people; "" if there is none.
    """

    ids: Ids
    labels: Ids
    num_trained: int
    by_role: list[int]
    notes: dict[str, int] = field(default_factory=dict)
    text: str = ""


class Encoder:
    """Encodes examples with one tokenizer.

    Args:
        settings: What is trained on, and how long samples may be.
        tokenizer: A fast tokenizer.
        stop_ids: End-of-text ids of the model's generation config.
    """

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int] = ()
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.backend: Backend = backend_of(tokenizer)
        self._lock = Lock()

    @cached_property
    def reference_masker(self) -> ReferenceMasker:
        """Masks any conversation; made for the first conversation, because other examples need no template."""
        template = resolve_template(self.settings.chat_template, self.tokenizer)
        render = Renderer(self.tokenizer, template, self.settings.template_options)
        return ReferenceMasker(
            render, self.backend, profile_template(render, self.backend, self.stop_ids), self.settings.train_on
        )

    @cached_property
    def pattern_masker(self) -> PatternMasker:
        """Masks conversations by token patterns that it learns from the reference."""
        return PatternMasker(self.reference_masker)

    def encode(self, examples: Sequence[Example]) -> list[list[Sample] | Refused]:
        """Encode each example as its samples: one, or several for expanded turns and long documents."""
        results: list[list[Sample] | Refused | None] = [None] * len(examples)
        with self._lock:
            self._make_ready(examples)
        if not self.settings.expand_turns:
            self._encode_by_pattern(examples, results)
        return [self._one(example) if done is None else done for example, done in zip(examples, results, strict=True)]

    def _make_ready(self, examples: Sequence[Example]) -> None:
        """Make what these examples need, in one thread only; later calls find it made."""
        kinds = set(map(type, examples))
        if Conversation in kinds:
            _ = self.pattern_masker
        if Document in kinds:
            _ = self._document_ends

    def _encode_by_pattern(self, examples: Sequence[Example], results: list[list[Sample] | Refused | None]) -> None:
        plain = []
        for number, example in enumerate(examples):
            if isinstance(example, Conversation) and (roles := self.pattern_masker.roles_of(example)):
                plain.append((number, example, roles))
        masked = (
            self.pattern_masker([example for _, example, _ in plain], [roles for _, _, roles in plain]) if plain else []
        )
        for (number, example, _), found in zip(plain, masked, strict=True):
            if found is not None:
                results[number] = [_sample_of_pattern(example, found)]

    def _one(self, example: Example) -> list[Sample] | Refused:
        try:
            match example:
                case Conversation():
                    turns = expand(example) if self.settings.expand_turns else [example]
                    return [self._conversation(turn) for turn in turns]
                case Document():
                    return self._document(example)
                case Tokens():
                    return [self._tokens(example)]
        except BadExampleError as error:
            return Refused(str(error))
        except RecursionError:
            return Refused("nested too deeply")

    def _conversation(self, conversation: Conversation) -> Sample:
        masked = self.reference_masker(conversation)
        if roles := self.pattern_masker.roles_of(conversation):
            self.pattern_masker.learn(roles, masked)
        return to_sample(masked)

    def _document(self, document: Document) -> list[Sample]:
        """Encode bos (if the tokenizer writes it), the text and eos; pieces of a long document overlap by one token.

        So every token but the document's first is trained exactly once.
        """
        bos, eos = self._document_ends
        ids = np.array([*bos, *self.backend.encode(document.text, add_special_tokens=False).ids, eos], dtype=np.int32)
        size = self.settings.max_seq_len
        starts = range(0, max(1, len(ids) - 1), size - 1)
        samples = [
            _sample(ids[start : start + size].copy(), ids[start : start + size].copy(), "document") for start in starts
        ]
        samples[0].text = document.text
        return samples

    @cached_property
    def _document_ends(self) -> tuple[list[int], int]:
        """The tokens before a document (as the tokenizer itself adds them) and the one after it."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ConfigError(
                "the tokenizer has no eos token to end documents with",
                where="model.init_args.model",
                remedy="set eos_token in the tokenizer's files",
            )
        empty: list[int] = self.tokenizer("").input_ids
        bos = self.tokenizer.bos_token_id
        return ([int(bos)] if bos is not None and empty[:1] == [bos] else []), int(eos)

    def _tokens(self, tokens: Tokens) -> Sample:
        size = len(self.tokenizer)
        if min(tokens.ids) < 0 or max(tokens.ids) >= size:
            raise BadExampleError(
                f"input_ids reach from {min(tokens.ids)} to {max(tokens.ids)}; the tokenizer has {size}"
            )
        return _sample(np.array(tokens.ids, dtype=np.int32), np.array(tokens.labels, dtype=np.int32), "tokens")


def to_sample(masked: MaskedConversation) -> Sample:
    """A masked conversation as arrays."""
    ids = np.array(masked.ids, dtype=np.int32)
    labels = np.full_like(ids, IGNORE_INDEX)
    for start, end in masked.trained:
        labels[start:end] = ids[start:end]
    sample = _sample(ids, labels, "template")
    for role, (start, end) in masked.texts:
        sample.by_role[_ROLE_NUMBER[role]] += end - start
        sample.by_role[_ROLE_NUMBER["template"]] -= end - start
    sample.notes = dict(masked.dropped)
    if masked.appended:
        sample.notes["end tokens appended"] = 1
    sample.text = masked.text
    return sample


def _sample_of_pattern(conversation: Conversation, masked: PatternMasked) -> Sample:
    by_role = [0] * len(ROLES)
    for message, count in zip(conversation.messages, masked.texts, strict=True):
        by_role[_ROLE_NUMBER[message.role]] += count
    by_role[_ROLE_NUMBER["template"]] = len(masked.ids) - sum(masked.texts)
    trained = int(np.count_nonzero(masked.labels != IGNORE_INDEX))
    return Sample(masked.ids, masked.labels, trained, by_role, text=masked.text)


def _sample(ids: Ids, labels: Ids, role: str) -> Sample:
    labels[0] = IGNORE_INDEX  # no token before it predicts it
    return Sample(ids, labels, int((labels != IGNORE_INDEX).sum()), [len(ids) if name == role else 0 for name in ROLES])
