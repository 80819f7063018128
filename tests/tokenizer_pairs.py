"""A tiny teacher, and students of other tokenizers, templates and special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaProcessor

from cachekd.models import load_model
from caches import cached
from templates import shape_processor
from tiny import QUESTIONS, noise_image, save_vlm, tiny_processor, tiny_vlm

# SentencePiece-like with a BOS, and a template that writes the blank before an answer; byte-level;
# SentencePiece-like without a blank before the text; byte-level, with a BOS, and an answer behind a blank.
STUDENTS = ("vicuna", "chatml", "gemma", "idefics")
# The teacher's merges; the students have those of `tiny.CORPUS`.
CORPUS = ["and a blue circle is there", "a large dog, and another", "twelve dogs are in there, or so it is"]
ANSWERS = [
    "red",
    "a large green dog, and a blue circle.",
    "there are twelve dogs\nand no circle",
    "un café 🙂 is there",
    "no",
    "is there another dog? yes, a large blue one",
]


def processor() -> LlavaProcessor:
    """The teacher's, of 320 byte-level tokens."""
    return tiny_processor(corpus=CORPUS)


def write_data(folder: Path, count: int, *, start: int = 0) -> Path:
    """A LLaVA-style file of one or two questions an image."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(start, start + count):
        noise_image(index).save(folder / f"{index}.png")
        turns = []
        for turn in range(1 + index % 2):
            question = QUESTIONS[(index + turn) % len(QUESTIONS)]
            turns.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": ANSWERS[(index + 2 * turn) % len(ANSWERS)]})
        records.append({"id": f"s{index:03d}", "image": f"{index}.png", "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def save_teacher(folder: Path) -> Path:
    """A VLM that has an opinion: random weights have next to none."""
    teacher_processor = processor()
    teacher = tiny_vlm(teacher_processor, text_width=48, seed=1)
    teacher.lm_head.weight.data *= 100
    teacher.save_pretrained(folder)
    teacher_processor.save_pretrained(folder)
    return folder


def save_student(folder: Path, name: str, eyes: Path | None = None, **settings: object) -> Path:
    """A VLM with the tokenizer and template of a shape, and more rows than tokens.

    Args:
        eyes: a model whose vision encoder it gets.
    """
    shape = shape_processor(name)
    student = tiny_vlm(shape, seed=3, vocab_size=len(shape.tokenizer) + 40, **settings)
    if eyes is not None:
        other = load_model(str(eyes), dtype=torch.float32, device=torch.device("cpu"))
        student.model.vision_tower.load_state_dict(other.model.vision_tower.state_dict())
    student.save_pretrained(folder)
    shape.save_pretrained(folder)
    return folder


def save_pair(folder: Path) -> Path:
    """A teacher, a student of its tokenizer ("same"), and `STUDENTS`, all with one vision encoder."""
    save_teacher(folder / "teacher")
    same = save_vlm(folder / "same", processor(), seed=2)
    for name in STUDENTS:
        save_student(folder / name, name, same)
    return folder


def run_settings(folder: Path, out: Path, **others: object) -> dict[str, Any]:
    """A run of a pair of `save_pair`, and its cache; the data are `write_data`'s in "data"."""
    settings: dict[str, Any] = {
        "teacher": str(folder / "teacher"),
        "data": str(folder / "data" / "data.json"),
        "student": str(folder / "vicuna"),
        "batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "align_vocabulary": "cells",
        "out": out,
    }
    return settings | others | {"cache": str(cached(settings, folder, tail="exact"))}
