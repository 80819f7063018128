"""A mix as people have it, from check to eval: time, memory, and whether every count is right.

python benchmarks/real_mix.py --json

A LLaVA-style JSON of 200,000 records over easy-VQA's pictures, with a BOM: 40 % of the ids come again, a
tenth of the samples is text alone, a tenth has a turn with `loss: false`, ten pictures are broken, five
answers are longer than the models' context. The demo's teacher and the student that it starts from.
Every command in a process of its own; `peak_mb` is its resident memory at the most, its workers' apart.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from apart import apart, printed_by, resident

from cachekd_cli.main import app

EXAMPLE = Path(__file__).parents[1] / "examples" / "easy_vqa"
BROKEN, TOO_LONG = 10, 5


def main(
    records: Annotated[int, typer.Option(min=100, help="In the JSON file.")] = 200_000,
    epochs: Annotated[float, typer.Option(help="Of training.")] = 1.0,
    test: Annotated[int, typer.Option(min=1, help="Of them evaluated: the first so many.")] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make the mix, run every command on it, and compare its counts with what was put in."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        expected = write_mix(folder, records)
        rows = [apart(measure, name, command) for name, command in commands(folder, epochs, test).items()]
    found = {name: value for row in rows for name, value in row.pop("counts").items()}
    wrong = {name: (value, found.get(name)) for name, value in expected.items() if found.get(name) != value}
    if as_json:
        print(json.dumps({"records": records, "runs": rows, "counts": found, "wrong": wrong}, indent=1))
    else:
        for row in rows:
            print(f"{row['command']:6} {row['seconds']:8.1f} s {row['peak_mb']:8,.0f} MB")
        print("counts:", found)
        print("wrong:", wrong or "none")
    raise typer.Exit(1 if wrong else 0)


def write_mix(folder: Path, records: int) -> dict[str, int]:
    """The file and its pictures; returns what the commands have to count."""
    import easy_vqa

    pictures = folder / "pictures"
    paths = easy_vqa.get_train_image_paths()
    pictures.mkdir()
    for image, path in paths.items():
        shutil.copyfile(path, pictures / f"{image}.png")
    (pictures / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:40])
    questions = list(zip(*easy_vqa.get_train_questions(), strict=True))
    broken = {records * (2 * place + 1) // (2 * BROKEN) for place in range(BROKEN)}
    too_long = {records * (2 * place + 1) // (2 * TOO_LONG) + 1 for place in range(TOO_LONG)}
    unique = records * 6 // 10
    mix: list[dict[str, Any]] = []
    for number in range(records):
        question, answer, image = questions[number % len(questions)]
        said = " ".join([answer] * 600) if number in too_long else answer
        asked = f"<image>\n{question}"
        turns: list[dict[str, Any]] = [
            {"from": "human", "value": asked},
            {"from": "gpt", "value": said},
        ]
        record: dict[str, Any] = {"id": f"coco-{number % unique}", "image": f"{image}.png"}
        if number in broken:
            record["image"] = "broken.png"
        elif number % 10 == 3 and number not in too_long:
            del record["image"]
            turns[0]["value"] = question
        elif number % 10 == 7:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            turns[1]["loss"] = False
        mix.append({**record, "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(mix), encoding="utf-8-sig")
    without = sum("image" not in record for record in mix)
    bad = broken | too_long
    return {
        "check: samples": records,
        "check: without an image": without,
        "check: repeated keys": records - unique,
        "check: too long": TOO_LONG,
        "dump: samples": records - len(bad),
        "dump: without an image": without,
        "dump: skipped": len(bad),
        "train: missing": len(bad),
        "train: bad": 0,
    }


def commands(folder: Path, epochs: float, test: int) -> dict[str, list[str]]:
    """In order; each takes what those before it made."""
    teacher, student = str(EXAMPLE / "teacher"), str(EXAMPLE / "student")
    data = [
        "--data",
        str(folder / "mix.json"),
        "--image-root",
        str(folder / "pictures"),
        "--on-error",
        "skip",
    ]
    cache = ["--cache", str(folder / "cache"), "--missing", "skip"]
    run = str(folder / "run")
    sizes = ["--batch-size", "64"]
    return {
        "check": ["check", "--teacher", teacher, "--student", student, *data],
        "dump": ["dump", "--teacher", teacher, *data, "--out", str(folder / "cache"), *sizes],
        "train": [
            *("train", "--student", student, "--teacher", teacher, *data, *cache, "--out", run),
            *("--epochs", str(epochs), *sizes),
        ],
        "eval": ["eval", run, *data, "--limit", str(test)],
    }


def measure(name: str, command: list[str]) -> dict[str, Any]:
    """Run it; its time, its memory, and what it counted."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    text = printed_by(app, [*command, "--json"], standalone_mode=False)
    return {
        "command": name,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mb": round(resident("VmHWM") / 2**20),
        "counts": {f"{name}: {what}": value for what, value in counts(name, json.loads(text)).items()},
    }


def counts(name: str, said: dict[str, Any]) -> dict[str, int]:
    """Out of a command's JSON."""
    if name == "check":
        data = said["data"]
        return {
            "samples": data["samples"],
            "without an image": data["without_image"],
            "repeated keys": data["repeated_keys"],
            "too long": said["lengths"]["beyond"],
        }
    if name == "dump":
        names = {"samples": "samples", "without an image": "without_image", "skipped": "skipped"}
        return {what: said[field] for what, field in names.items()}
    if name == "train":
        return {what: said[what]["samples"] for what in ("missing", "bad")}
    asked = said["asked"]
    return {"questions": asked["questions"], "left out": asked["left_out"]["samples"]}


if __name__ == "__main__":
    typer.run(main)
