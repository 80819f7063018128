"""easy-VQA (Zhou 2019; the data is inside the PyPI package) as LLaVA conversations and WebDataset tars."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Literal

import easy_vqa
import webdataset

Split = Literal["train", "test"]
SHAPES = ("rectangle", "circle", "triangle")
COLORS = ("black", "gray", "red", "green", "blue", "yellow", "teal", "brown")


def image_paths(split: Split) -> dict[int, str]:
    """Image id to path; 4,000 training and 1,000 test images of 64 x 64."""
    return easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()


def questions_by_image(split: Split) -> dict[int, list[tuple[str, str]]]:
    """Image id to its (question, answer) pairs, in the data set's order."""
    get = easy_vqa.get_train_questions if split == "train" else easy_vqa.get_test_questions
    grouped: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*get(), strict=True):
        grouped[image].append((question, answer))
    return grouped


def conversation(pairs: list[tuple[str, str]], *, picture: bool = True) -> list[dict[str, str]]:
    """(question, answer) pairs as one LLaVA conversation; a picture stands in the first question."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if index or not picture else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return turns


def write_tar(split: Split, path: Path, *, images: int, turns: int | None = None) -> int:
    """Write the first `images` images with up to `turns` questions each, drawn at random.

    In the data set's order an image is first asked for shape and colour, and these answers give later ones
    away: of its first three questions, next to none with yes or no needs the image.

    Returns:
        the number of questions.
    """
    paths, questions = image_paths(split), questions_by_image(split)
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for image in sorted(paths)[:images]:
            pairs = questions[image]
            if turns is not None:
                pairs = random.Random(image).sample(pairs, min(turns, len(pairs)))
            count += len(pairs)
            key = f"{split}-{image:05d}"
            png = Path(paths[image]).read_bytes()
            tar.write({"__key__": key, "png": png, "json": {"conversations": conversation(pairs)}})
    return count


def write_questions(path: Path) -> int:
    """Write all training questions without pictures, for `--prior-data`; returns their number."""
    records = [
        {"id": str(image), "conversations": conversation(pairs, picture=False)}
        for image, pairs in questions_by_image("train").items()
    ]
    path.write_text(json.dumps(records))
    return sum(len(record["conversations"]) // 2 for record in records)
