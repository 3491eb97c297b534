"""The words that the glossary forbids are not used in the code and the documents."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = [
    "callbacks",
    "checkpoints",
    "commands",
    "config",
    "data",
    "demo",
    "doctor",
    "launch",
    "methods",
    "models",
    "ops",
    "parallel",
    "runs",
    "training",
]
CHECKED = ("lightning_hub/*.py", *(f"lightning_hub/{package}/**/*.py" for package in PACKAGES))
"""The code whose strings, comments and docstrings are checked."""

GLOSSARY = ROOT / "docs/glossary.md"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "claims.md"),
]

GENERATED_ROW = r"^\| `[^\n]* (?:refused|one by one|packed in)[^\n]*$"
"""A row of the table in models.md. It quotes messages."""

Text = tuple[int, str]
"""The number of the first line of a text, and the text."""


def forbidden() -> dict[str, re.Pattern[str]]:
    """Return the phrases of the glossary that are never used. One with parentheses has allowed meanings: left out."""
    table = GLOSSARY.read_text(encoding="utf-8").partition("| not | but |\n|---|---|\n")[2]
    phrases = [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("|")]
    never = [phrase for phrase in phrases if "(" not in phrase]
    return {phrase: re.compile(rf"\b{re.escape(phrase)}(?:e?s)?\b".replace(r"\ ", r"\s+"), re.I) for phrase in never}


def texts_of_code(source: str) -> Iterator[Text]:
    """Yield comments, docstrings and other strings. A string without a space is a name, a key or a path: left out."""
    block: list[str] = []
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:  # comments in neighbouring lines are one text
            start = start if block else token.start[0]
            block.append(token.string.lstrip("# "))
        elif block and token.type not in (tokenize.NL, tokenize.NEWLINE):
            yield start, " ".join(block)
            block = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 1:
            yield node.lineno, node.value


def texts_of_document(text: str) -> Iterator[Text]:
    """Yield the paragraphs without code, generated rows and the table of forbidden phrases."""
    prose = re.sub(r"^## Words that are not used\n.*", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in (r"^( *)```.*?^\1```", GENERATED_ROW, r"`[^`]*`"):
        prose = re.sub(code, lambda match: "\n" * match[0].count("\n"), prose, flags=re.MULTILINE | re.DOTALL)
    line = 1
    for paragraph in re.split(r"(\n\s*\n)", prose):
        yield line, paragraph
        line += paragraph.count("\n")


def found_in(texts: Iterator[Text], name: str) -> list[str]:
    phrases = forbidden()
    return sorted(
        {
            f"{name}:{line + text.count(chr(10), 0, match.start())}: {phrase}"
            for line, text in texts
            for phrase, pattern in phrases.items()
            for match in pattern.finditer(text)
        }
    )


@pytest.mark.parametrize("pattern", CHECKED)
def test_code_uses_no_forbidden_phrase(pattern: str) -> None:
    paths = sorted(ROOT.glob(pattern))
    assert paths, "the pattern names files"
    found = [
        fault
        for path in paths
        for fault in found_in(texts_of_code(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT)))
    ]
    assert found == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_uses_no_forbidden_phrase(path: Path) -> None:
    assert found_in(texts_of_document(path.read_text(encoding="utf-8")), path.name) == []


def test_the_table_of_the_glossary_is_read() -> None:
    phrases = forbidden()
    assert len(phrases) >= 20
    assert {"crew", "wish", "without a word", "let go of"} <= phrases.keys()
    assert not {"hang on", "row", "told", "is no X"} & {phrase.partition(" (")[0] for phrase in phrases}


def test_a_forbidden_phrase_is_found_wherever_it_is_written() -> None:
    source = '''"""The
crew."""

# it ends without a
# word
LABEL = f"{1} goes  on"
KEY, LIST = "session", ["mends", "it is mended"]
NOTE = "two wishes"  # a crewed ship
'''
    found = [fault.removeprefix("x.py:") for fault in found_in(texts_of_code(source), "x.py")]
    assert found == ["2: crew", "4: without a word", "6: goes on", "8: wish"]
    document = "A run goes\non.\n\n```\nthe crew\n```\n\nA `wish`, and\nthe crew.\n"
    assert found_in(texts_of_document(document), "y.md") == ["y.md:1: goes on", "y.md:9: crew"]
