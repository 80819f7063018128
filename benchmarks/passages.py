"""Real English that lies on every machine with cachekd: paragraphs of docstrings of installed packages.

A paragraph's beginning is the question, "Continue this text: ...", and the rest of it the answer.
What is learned and what is held out come from different files.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = ("torch", "sympy", "networkx", "pandas", "numpy", "transformers")
ASKED_WORDS = 20
LENGTHS = range(350, 700)  # characters of a paragraph


def paragraphs(package: str) -> Iterator[tuple[str, str]]:
    """A package's files and their paragraphs of plain prose, in order; each paragraph once."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: name others with --packages")
    root, seen = Path(spec.origin).parent, set()
    for path in sorted(root.rglob("*.py")):
        if "test" in str(path.relative_to(root)):
            continue
        for text in _docstrings(path):
            for part in re.split(r"\n\s*\n", text):
                paragraph = " ".join(part.split())
                if _is_prose(paragraph) and paragraph not in seen:
                    seen.add(paragraph)
                    yield f"{package}/{path.relative_to(root)}", paragraph


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _is_prose(text: str) -> bool:
    """Whole sentences: no table, list, argument or code."""
    if len(text) not in LENGTHS or not re.match(r"[A-Z][a-z]* ", text) or not text.endswith("."):
        return False
    plain = sum(character.isalpha() or character in " ,.'-" for character in text)
    return plain > 0.97 * len(text) and not re.search(r"--|::|>>>|: |\.\. | [-*] ", text)


def write_passages(folder: Path, packages: Sequence[str], train: int, held_out: int) -> tuple[int, int]:
    """Write train.jsonl and held_out.jsonl; returns how many passages each has, at most what is asked."""
    by_file: dict[str, list[str]] = {}
    for package in packages:
        for path, paragraph in paragraphs(package):
            by_file.setdefault(path, []).append(paragraph)
    files = sorted(by_file)
    random.Random(0).shuffle(files)
    counts = []
    for name, most in (("held_out", held_out), ("train", train)):
        records: list[str] = []
        while files and len(records) < most:
            path = files.pop()
            records += [_record(path, number, text) for number, text in enumerate(by_file[path])]
        (folder / f"{name}.jsonl").write_text("\n".join(records[:most]) + "\n")
        counts.append(min(len(records), most))
    return counts[1], counts[0]


def _record(path: str, number: int, paragraph: str) -> str:
    words = paragraph.split(" ")
    turns = [
        {"role": "user", "content": f"Continue this text: {' '.join(words[:ASKED_WORDS])}"},
        {"role": "assistant", "content": " ".join(words[ASKED_WORDS:])},
    ]
    return json.dumps({"id": f"{path}#{number}", "messages": turns})
