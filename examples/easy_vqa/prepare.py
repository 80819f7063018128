"""Write the demo's data (WebDataset tars) and its untrained student.

python examples/easy_vqa/prepare.py --out runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoProcessor

from data import write_tar  # isort: skip
from models import make_model  # isort: skip

TEACHER = Path(__file__).parent / "teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000, help="training images")
    parser.add_argument(
        "--turns", type=int, default=3, help="questions per training image; of more, earlier answers tell"
    )
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the student's initial weights")
    options = parser.parse_args()
    train = write_tar("train", options.out / "train" / "000.tar", images=options.images, turns=options.turns)
    test = write_tar("test", options.out / "test" / "000.tar", images=options.test_images)
    torch.manual_seed(options.seed)
    processor = AutoProcessor.from_pretrained(TEACHER)
    student = make_model(processor, vision_layers=2, text_layers=2, text_width=96)
    student.save_pretrained(options.out / "student")
    processor.save_pretrained(options.out / "student")
    print(f"questions: {train:,} training, {test:,} test; student: {student.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
