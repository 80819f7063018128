"""Train the teacher and the starting student on the training vendors' drawings, reproducibly, on a CPU.

    python examples/emoji/train_models.py --out runs/emoji

As with large VLMs, from parts that can already do something:

1. The vision tower learns to find one vendor's drawing of a thing by another's among 128 things (CLIP's loss,
   between drawings); the teacher's also of what group and sort a thing is. Where it learns to name things
   instead, from two drawings of each, this does not carry over to a third.
2. The projector and the language model learn to answer from the frozen tower's features: the teacher all that
   is asked, the student only of what sort a thing is, which the data never ask.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from cachekd.errors import CachekdError

from llava import make_model, make_processor  # isort: skip
from packages import FOLDER, VENDORS  # isort: skip
from small_llava import IGNORE, IMAGE_SIZE, PATCH_SIZE, VISION_WIDTH, optimise  # isort: skip
from things import Picture, ask, read_pictures  # isort: skip

Pairs = list[tuple[str, str]]
SEATS = (IMAGE_SIZE // PATCH_SIZE) ** 2  # image tokens
VIEWS = 8  # of each drawing, that the language model is shown
SORT = "what sort is it?"


def load_pixels(pictures: list[Picture]) -> Tensor:
    """[N, 4, 64, 64] float in [0, 1]: colours times opacity, and opacity."""
    arrays = [np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGBA")) for picture in pictures]
    rgba = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def augment(rgba: Tensor) -> Tensor:
    """Turn, scale, shift and recolour a little, and put on white.

    Returns:
        [B, 3, 64, 64] float in [-1, 1], as the processor normalises.
    """
    count = len(rgba)
    angle = torch.empty(count).uniform_(-0.12, 0.12)
    scale = torch.empty(count, 1, 1).uniform_(0.88, 1.16) * torch.empty(count, 2, 1).uniform_(0.94, 1.06)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(count, 2, 2)
    affine = torch.cat([turn / scale, torch.empty(count, 2, 1).uniform_(-0.08, 0.08)], 2)
    grid = F.affine_grid(affine, list(rgba.shape), align_corners=False)
    rgba = F.grid_sample(rgba, grid, align_corners=False)
    gain = torch.empty(count, 1, 1, 1).uniform_(0.8, 1.1) + torch.empty(count, 3, 1, 1).uniform_(-0.1, 0.1)
    return 2 * ((rgba[:, :3] * gain).clamp(0, 1) + 1 - rgba[:, 3:]) - 1


def shuffled(count: int, size: int) -> Iterator[Tensor]:
    """Batches of indices, epoch after epoch."""
    while True:
        yield from torch.randperm(count).split(size)


def numbered(values: list[str]) -> Tensor:
    """[N] int64: for each value its place among all."""
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return torch.tensor([places[value] for value in values])


def see_patches(tower: nn.Module, pixels: Tensor) -> None:
    """Begin with the patches' principal components, whitened: random filters lose most of a patch."""
    patches = F.unfold(augment(pixels), PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    patches = patches - patches.mean(0)
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    whitened = components[:, -VISION_WIDTH:] / (variances[-VISION_WIDTH:] + 0.02 * variances[-1]).sqrt()
    rotation, _ = torch.linalg.qr(torch.randn(VISION_WIDTH, VISION_WIDTH))
    weight = tower.get_submodule("embeddings.patch_embedding").weight
    assert isinstance(weight, nn.Parameter)
    weight.data.copy_((rotation @ whitened.T).reshape(weight.shape))


def train_tower(tower: nn.Module, drawn: Tensor, labels: list[Tensor], steps: int) -> None:
    """Stage 1.

    Args:
        drawn: [vendors, N, 4, 64, 64]: the same N things of each vendor.
        labels: [N] each, what else it is to tell.
    """
    see_patches(tower, drawn[:, torch.randperm(drawn.shape[1])[:1000]].flatten(0, 1))
    sizes = [int(label.max()) + 1 for label in labels]
    heads = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(VISION_WIDTH),
            "where": nn.Linear(SEATS * VISION_WIDTH, 128, bias=False),
            "mean": nn.Linear(VISION_WIDTH, 128, bias=False),
        }
    )
    if labels:
        heads["labels"] = nn.Linear(VISION_WIDTH, sum(sizes))

    def loss_of(batch: Tensor) -> Tensor:
        sides = drawn[torch.randperm(len(drawn))[:2]][:, batch]
        features = tower(pixel_values=augment(sides.flatten(0, 1))).last_hidden_state[:, 1:]
        features = heads["norm"](features)
        places = torch.arange(len(batch))
        losses = []
        for points in (heads["where"](features.flatten(1)), heads["mean"](features.mean(1))):
            one, other = F.normalize(points, dim=1).split(len(batch))
            alike = 12 * one @ other.T
            losses += [F.cross_entropy(alike, places) / 2, F.cross_entropy(alike.T, places) / 2]
        told = heads["labels"](features.mean(1)).split(sizes, 1) if labels else []
        losses += [
            0.3 * F.cross_entropy(one, label[batch].repeat(2))
            for one, label in zip(told, labels, strict=True)
        ]
        return torch.stack(losses).sum()

    optimise(
        nn.ModuleList([tower, heads]), shuffled(drawn.shape[1], 128), loss_of, steps, 1e-3, "tower", warmup=20
    )


class Tokens:
    """Conversations as token ids, and which of them are answers."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.tokenizer = processor.tokenizer

    def __call__(self, batch: list[Pairs]) -> tuple[Tensor, Tensor]:
        """input_ids and labels [B, S], padded on the right; labels are shifted already."""
        rows = [self._row(pairs) for pairs in batch]
        size = max(len(ids) for ids, _ in rows)
        fills = (self.tokenizer.pad_token_id, IGNORE)
        ids, labels = (
            torch.tensor([row[i] + [fill] * (size - len(row[i])) for row in rows])
            for i, fill in enumerate(fills)
        )
        return ids, labels.roll(-1, 1)

    def _row(self, pairs: Pairs) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for number, (question, answer) in enumerate(pairs):
            image = "" if number else "<image>" * SEATS
            asked = self.tokenizer(f"<|user|>{image}{question}<|end|><|assistant|>")["input_ids"]
            said = self.tokenizer(f"{answer}<|end|>")["input_ids"]
            ids += asked + said
            labels += [IGNORE] * len(asked) + said
        return ids, labels


def train_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pixels: Tensor,
    questions: Callable[[list[int]], list[Pairs]],
    epochs: int,
) -> None:
    """Stage 2: answers to `questions` (of drawings by their index) from what the tower makes of `pixels`."""
    tokens, image_token = Tokens(processor), model.config.image_token_id
    tower, projector, language = (
        model.model.vision_tower,
        model.model.multi_modal_projector,
        model.model.language_model,
    )
    with torch.no_grad():
        views = [
            [tower(pixel_values=augment(part)).last_hidden_state[:, 1:].half() for part in pixels.split(256)]
            for _ in range(VIEWS)
        ]
    features = torch.stack([torch.cat(view) for view in views])

    def loss_of(batch: Tensor) -> Tensor:
        ids, labels = tokens(questions(batch.tolist()))
        seen = projector(features[torch.randint(0, VIEWS, batch.shape), batch].float())
        embedded = language.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == image_token)[:, :, None], seen)
        answers = labels != IGNORE
        hidden = language(inputs_embeds=embedded).last_hidden_state[answers]
        return F.cross_entropy(model.lm_head(hidden), labels[answers])

    steps = epochs * len(pixels) // 64
    optimise(
        nn.ModuleList([projector, language]), shuffled(len(pixels), 64), loss_of, steps, 2e-3, "answers", 20
    )


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"saved {folder}: {model.num_parameters():,} parameters")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vendors", nargs="+", choices=VENDORS, default=["google", "twitter"])
    parser.add_argument("--packages", type=Path, default=FOLDER, help="where the npm packages are kept")
    parser.add_argument("--tower-steps", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=40, help="of answers")
    parser.add_argument("--student-tower-steps", type=int, default=50)
    parser.add_argument("--student-epochs", type=int, default=3, help="of answers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # other counts round differently

    try:
        pictures = [
            picture
            for picture in read_pictures(options.vendors, options.packages)
            if not picture.thing.unseen
        ]
    except CachekdError as error:
        sys.exit(f"error: {error}")
    pixels = load_pixels(pictures)
    drawn = pixels.unflatten(0, (len(options.vendors), -1))
    things = [picture.thing for picture in pictures[: drawn.shape[1]]]
    labels = [numbered([thing.group for thing in things]), numbered([thing.sort for thing in things])]
    asked = ask(pictures, "teacher")
    sorts = [(SORT, picture.thing.sort.replace("-", " ")) for picture in pictures]
    processor = make_processor(text for pairs in [*asked, sorts] for pair in pairs for text in pair)

    torch.manual_seed(0)
    student = make_model(processor, vision_layers=2, text_layers=2, text_width=96)
    train_tower(student.model.vision_tower, drawn, [], options.student_tower_steps)
    say_sorts = lambda batch: [[sorts[i]] for i in batch]  # noqa: E731
    train_answers(student, processor, pixels, say_sorts, options.student_epochs)
    save(student, processor, options.out / "student")

    torch.manual_seed(0)
    draw = random.Random(0)
    teacher = make_model(processor, vision_layers=4, text_layers=4, text_width=144)
    train_tower(teacher.model.vision_tower, drawn, labels, options.tower_steps)

    def some(batch: list[int]) -> list[Pairs]:
        """One question or all: as an evaluation asks, and as they stand in the data."""
        alone = draw.random() < 0.5
        return [draw.sample(asked[i], 1 if alone else len(asked[i])) for i in batch]

    train_answers(teacher, processor, pixels, some, options.epochs)
    save(teacher, processor, options.out / "teacher")


if __name__ == "__main__":
    main()
