"""Find secrets that are written in a recipe. Secrets belong in environment variables, read with ``${env:NAME}``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lightning_hub.config.recipe import Recipe, keyed_fault
from lightning_hub.config.yaml_reader import KeyPath, YamlValue
from lightning_hub.errors import ConfigError

_REMEDY = "put it into an environment variable and write ${env:NAME}"
_REFERENCE = re.compile(r"\$\{env:[A-Za-z_]\w*\}")

_SECRET_KEY = re.compile(
    r"(^|.*[_.-])(pass(word|wd|phrase)|secrets?|credentials?|api_?keys?|(access|private|secret|auth|account)_?keys?)$"
    r"|^((auth|access|hf|hub|huggingface|api|bearer|refresh|github|git|wandb|login|user|session|write|read)_?)*tokens?$",
)
"""Keys whose text is a secret. Tokens of a model (``cls_token``, ``pad_token``) are not secrets."""

_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}"
    r"|\bglpat-[\w-]{16,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\b[a-zA-Z][\w+.-]*://[^/\s:@]*:(?!\$\{env:)[^/\s@]+@",
)
"""Texts that are secrets under any key: keys of known services, and URLs with a password."""


def mask_secrets(text: str) -> str:
    """Return the text with every known form of a secret replaced by ``***``."""
    return _SECRET_VALUE.sub("***", text)


def is_secret(key: str, value: YamlValue) -> bool:
    """Return whether the value of this option is a secret."""
    if not isinstance(value, str) or not value or _REFERENCE.fullmatch(value):
        return False
    return _SECRET_VALUE.search(value) is not None or _SECRET_KEY.fullmatch(key.lower()) is not None


def check_secrets(recipe: Recipe) -> Iterator[ConfigError]:
    """Yield one fault for each secret, in comments too. No message contains the secret."""
    reported: set[str | None] = set()
    for path, value in _scalars(recipe.tree, ()):
        names = [str(key) for key in path if isinstance(key, str)]
        if is_secret(names[-1] if names else "", value):
            reported.add(recipe.where(path))
            yield keyed_fault(recipe, path, "a secret is written in the recipe (not shown)", _REMEDY)
    for source in recipe.sources:
        if source.name.startswith("--"):
            continue  # the value of a flag is part of the tree
        for number, line in enumerate(source.text.splitlines(), 1):
            where = f"{source.name}:{number}"
            if _SECRET_VALUE.search(line) and where not in reported:
                yield ConfigError("a secret is written in this line (not shown)", where=where, remedy=_REMEDY)


def _scalars(value: YamlValue, path: KeyPath) -> Iterator[tuple[KeyPath, YamlValue]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _scalars(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _scalars(child, (*path, index))
    else:
        yield path, value
