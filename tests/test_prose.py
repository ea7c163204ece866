"""Prose is plain technical English: a list of words and turns of phrase that this project does not use."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from checkout import ROOT

# what to avoid (a regular expression), and what to write
AVOID = {
    r"\btells?\b": "report, indicate, return",
    r"\btold\b": "reported, given",
    r"\b(?:that|which|who) (?:is|are) none\b": "invalid, missing",
    r"\bwhoever\b|\bsomebody\b|\bnobody\b": "name the component",
    r"\bthe like\b": "say what",
    r"\bhow-?manieth\b": "n-th",
    r"\banew\b": "again",
    r"\bmends?\b|\bmended\b": "fix, correct",
    r"\bin vain\b": "without effect",
    r"\bwings?\b": "side",
    r"\b(?:colour|behaviour|favour|neighbour|centre|grey|judgement|cancelled|initialis\w*|normalis(?:ed|ing|ation)|optimis\w*|serialis\w*)\b":
        "American spelling",
    r"\bgoes on from\b|\bgo on from\b": "resume from, continue from",
    r"\bis passed over\b|\bare passed over\b": "is skipped",
    r"\btaken up\b|\btakes? up\b": "load, restore",
}  # fmt: skip
ALLOWED = {"--no-colour", "not normalised", "CANCELLED"}  # an option, an arm of a study, a state of Slurm
SOURCES = [
    *sorted((ROOT / "gear_lightning").rglob("*.py")),
    *sorted((ROOT / "callbacks").glob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "evidence/" not in str(p)),
    *sorted((ROOT / "configs").rglob("*.yaml")),
]


def prose_of(path: Path) -> list[tuple[int, str]]:
    """Lines of prose with their numbers: comments and text of Python files, all of others but code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        code = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
        text = code.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
        if path.suffix == ".yaml":
            return [(n, line) for n, line in enumerate(text.splitlines(), 1) if "#" in line]
        return list(enumerate(text.splitlines(), 1))
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            if re.fullmatch(r"\w*([\"'])\w*\1", token.string):
                continue  # a name
            # f-strings hold code, and the section of arguments begins with their names
            lines = re.sub(r"\{(?:[^{}]|\{[^{}]*\})*\}", "", token.string).splitlines()
            found += [(token.start[0] + i, re.sub(r"^\s+\w+:", "", line)) for i, line in enumerate(lines)]
    names = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    return found + [(node.lineno, node.name.replace("_", " ")) for node in names]


def faults(path: Path) -> list[str]:
    found = []
    for number, line in prose_of(path):
        for allowed in ALLOWED:
            line = line.replace(allowed, "")
        for pattern, instead in AVOID.items():
            if hit := re.search(pattern, line, re.IGNORECASE):
                found.append(f"{path.relative_to(ROOT)}:{number}: {hit[0]!r}; write: {instead}")
    return found


@pytest.mark.parametrize(
    "path", [p for p in [*SOURCES, *PAGES] if p.name != "test_prose.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_file_has_plain_words(path):
    assert not faults(path)
