"""What the documents name exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_test_and_benchmark_that_holds_a_promise_exists() -> None:
    claims = (ROOT / "docs/claims.md").read_text(encoding="utf-8")
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    functions = {name for text in tests.values() for name in re.findall(r"def (test_\w+)", text)}
    modules = {path.stem for path in tests}
    assert set(re.findall(r"\btest_\w+", claims)) - functions - modules == set()
    files = re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", claims)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_tree_in_the_readme_is_the_real_one() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## The tree\n\n```text\n(.*?)```", readme, re.DOTALL)
    assert tree is not None
    lines = [line.split() for line in tree[1].splitlines()]
    shown = {line[0] for line in lines}
    real = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._"}
    real -= {"build/", "dist/", "runs/", "lightning_hub/", "lightning_hub.egg-info/"}
    package = {f"lightning_hub/{path.name}/" for path in (ROOT / "lightning_hub").iterdir() if path.is_dir()}
    assert real | package - {"lightning_hub/__pycache__/"} == shown
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    light = {line[0] for line in lines if line[1] == "light"} - {"lightning_hub/configs/"}
    assert light == {f"{name.replace('.', '/')}/" for name in contract["source_modules"]} - {"lightning_hub/errors/"}


def test_every_answer_of_where_is_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = re.search(r"## Where is \.\.\.\?\n(.*?)\n## ", page, re.DOTALL)
    assert section is not None
    named = re.findall(r"`((?:lightning_hub/)?[a-z_]+/[\w/]+(?:\.py|/)?)`", section[1])
    assert len(named) >= 10
    assert [name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "lightning_hub"))] == []


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.name}: {target}")
    assert broken == []


def test_no_line_of_a_document_is_longer_than_120_characters() -> None:
    pages = [*DOCUMENTS, ROOT / "CHANGELOG.md"]
    with_long_rows = {"claims.md", "models.md"}  # a table has one line for each row; those of models.md are generated
    long = [
        f"{page.name}:{number}"
        for page in pages
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120 and not (page.name in with_long_rows and line.startswith("| "))
    ]
    assert long == []
