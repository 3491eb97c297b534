"""Chooses the chat template, and renders with it.

Rendering is transformers' own (``apply_chat_template``), which runs templates in a sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from lightning_hub.errors import ConfigError

Turn: TypeAlias = dict[str, object]
"""One message as a template sees it."""

_FOLDER = resources.files("lightning_hub.data.masking") / "templates"

_CONTROL_TOKENS = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>|\[/?INST\]")


class TemplateRefusal(ValueError):
    """The template raised on one conversation; the message is the template's own."""


def built_in_templates() -> list[str]:
    """Names that ``chat_template`` accepts beside a file."""
    return sorted(entry.name.removesuffix(".jinja") for entry in _FOLDER.iterdir() if entry.name.endswith(".jinja"))


def resolve_template(wanted: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The source of the template to use: a file, a built-in one by name, or None for the tokenizer's own.

    Raises:
        ConfigError: Neither exists, or the tokenizer has no template and none was chosen.
    """
    names = ", ".join(built_in_templates())
    if wanted is None:
        if tokenizer.chat_template:
            return None
        raise ConfigError(
            "the tokenizer has no chat template, and none is guessed",
            where="data.init_args.chat_template",
            remedy=f"give a template file or one of the built-in ones ({names}; plain adds nothing to the texts), "
            "or use a tokenizer that has one",
        )
    if wanted in built_in_templates():
        source = (_FOLDER / f"{wanted}.jinja").read_text(encoding="utf-8")
        _check_tokens(wanted, source, tokenizer)
        return source
    if Path(wanted).is_file():
        return _read(Path(wanted))
    raise ConfigError(
        f"{wanted!r} is neither a file nor a built-in template",
        where="data.init_args.chat_template",
        remedy=f"one of {names}",
    )


def _check_tokens(name: str, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a built-in template whose control tokens would be spelled out letter by letter."""
    vocabulary = tokenizer.get_vocab()
    missing = sorted(set(_CONTROL_TOKENS.findall(source)) - vocabulary.keys())
    if missing:
        raise ConfigError(
            f"the tokenizer has no {' '.join(missing)}, which the built-in template {name!r} writes",
            where="data.init_args.chat_template",
            remedy="use the template that belongs to the model; plain needs no tokens of its own",
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a template: {error}",
            where="data.init_args.chat_template",
            remedy="give a UTF-8 text file",
        ) from error


@dataclass(frozen=True)
class Renderer:
    """Renders conversations with one tokenizer, one template and fixed options.

    Attributes:
        tokenizer: Gives the special tokens, and the template where ``template`` is None.
        template: The source of a template that replaces the tokenizer's own.
        options: Variables for the template.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    options: Mapping[str, str | bool | int | float]

    @property
    def source(self) -> str:
        """The template's source, or all of them where the tokenizer holds several."""
        return self.template if self.template is not None else str(self.tokenizer.chat_template)

    def __call__(
        self, turns: Sequence[Turn], tools: Sequence[Turn] | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """Render one conversation.

        Raises:
            TemplateRefusal: The template raised.
        """
        return cast(str, self._render(list(turns), tools, add_generation_prompt))

    def many(self, conversations: Sequence[Sequence[Turn]]) -> list[str] | None:
        """Render conversations without tools in one call; None if the template raises on any of them."""
        try:
            return cast(list[str], self._render(conversations, None, False))
        except TemplateRefusal:
            return None

    def _render(self, conversation: object, tools: object, add_generation_prompt: bool) -> object:
        apply = cast(Callable[..., object], self.tokenizer.apply_chat_template)  # typed for fewer shapes than it takes
        try:
            return apply(
                conversation,
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.options,
            )
        except Exception as error:  # a template is a program: it can raise anything, and all of it is its refusal
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from error
