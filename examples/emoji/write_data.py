"""Write the training and test data, as WebDataset tars and as Hugging Face `datasets` folders.

    python examples/emoji/write_data.py --out runs/emoji

`train` has the training vendors' drawings; `test` another vendor's drawings of the same things; `unseen` that
vendor's of one thing in ten, of which no drawing is trained on, and whose names are not asked.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import webdataset
from datasets import Dataset, Features, Image, Value

from cachekd.errors import CachekdError

from packages import FOLDER, VENDORS  # isort: skip
from things import Picture, ask, read_pictures  # isort: skip

Pairs = list[tuple[str, str]]
FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "conversations": [{"from": Value("string"), "value": Value("string")}],
    }
)


def split(pictures: list[Picture], test: str, *, images: int | None, seed: int) -> dict[str, list[Picture]]:
    """The pictures of `train` (the first `images` of them), `test` and `unseen`, each in random order."""
    parts: dict[str, list[Picture]] = {"train": [], "test": [], "unseen": []}
    for picture in pictures:
        if picture.vendor == test:
            parts["unseen" if picture.thing.unseen else "test"].append(picture)
        elif not picture.thing.unseen:
            parts["train"].append(picture)
    for part in parts.values():
        random.Random(seed).shuffle(part)
    parts["train"] = parts["train"][:images]
    return parts


def record(picture: Picture, pairs: Pairs) -> dict[str, Any]:
    """A picture's questions as a LLaVA conversation; the picture stands in the first."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if index else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": picture.key, "conversations": turns}


def write_tar(path: Path, pictures: list[Picture], asked: list[Pairs]) -> None:
    """One tar; a sample is `google-1f34e.png`, as the vendor drew it, and `google-1f34e.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for picture, pairs in zip(pictures, asked, strict=True):
            tar.write({"__key__": picture.key, "png": picture.png, "json": record(picture, pairs)})


def write_dataset(folder: Path, pictures: list[Picture], asked: list[Pairs]) -> None:
    """The same samples by `save_to_disk`."""
    rows = [
        {**record(picture, pairs), "image": {"bytes": picture.png, "path": None}}
        for picture, pairs in zip(pictures, asked, strict=True)
    ]
    Dataset.from_list(rows, features=FEATURES).save_to_disk(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", nargs="+", choices=VENDORS, default=["google", "twitter"], help="vendors")
    parser.add_argument("--test", choices=VENDORS, default="facebook", help="vendor")
    parser.add_argument("--images", type=int, help="training pictures; all by default")
    parser.add_argument("--packages", type=Path, default=FOLDER, help="where the npm packages are kept")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order of the pictures, and of the questions"
    )
    options = parser.parse_args(arguments)
    if options.test in options.train:
        parser.error(f"--test {options.test} draws the training pictures too")
    try:
        pictures = read_pictures([*options.train, options.test], options.packages)
    except CachekdError as error:
        sys.exit(f"error: {error}")
    for name, some in split(pictures, options.test, images=options.images, seed=options.seed).items():
        asked = ask(some, f"{name} {options.seed}", names=name != "unseen")
        write_tar(options.out / name / "000.tar", some, asked)
        write_dataset(options.out / "datasets" / name, some, asked)
        print(f"{name}: {len(some):,} pictures, {sum(map(len, asked)):,} questions")


if __name__ == "__main__":
    main()
