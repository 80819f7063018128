"""Write the demo's data: WebDataset tars for training and test, and what the training questions' text tells.

python examples/easy_vqa/prepare.py --out runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data import write_questions, write_tar  # isort: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=4000, help="training images; 4,000 are all")
    parser.add_argument(
        "--turns", type=int, default=3, help="questions per training image; of more, earlier answers tell"
    )
    parser.add_argument("--test-images", type=int, default=1000)
    options = parser.parse_args()
    train = write_tar("train", options.out / "train" / "000.tar", images=options.images, turns=options.turns)
    test = write_tar("test", options.out / "test" / "000.tar", images=options.test_images)
    told = write_questions(options.out / "questions.json")
    print(f"questions: {train:,} training, {test:,} test; {told:,} for what the text alone tells")


if __name__ == "__main__":
    main()
