"""Train the demo's teacher on easy-VQA, reproducibly, on a CPU.

    python examples/easy_vqa/train_teacher.py --out examples/easy_vqa/teacher

As with large VLMs, from parts that can already do something, all from the training split alone:

1. The vision tower learns to name shape and colour, which it reads off the questions and answers; augmented
   with flips, scaling, shifts and exchanged colour channels, because a ViT this small does not learn shapes
   from 4,000 plain images.
2. The language model learns to answer from captions: words for shape and colour sit where the image would.
   Negated questions come later. (Asked "is there not a red shape?" from the start it learns nothing: the
   answer is the parity of "not" and "red", and no part of it helps by itself.)
3. The projector learns to put the image where the words were; the rest is frozen.
4. Everything learns to answer. In half of the batches a question sees the image and itself alone (earlier
   answers would give this one away, and nothing would be learned from the image), in the other half the
   conversation so far, as it will be used.
"""

from __future__ import annotations

import argparse
import itertools
import random
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from data import COLORS, SHAPES, conversation, image_paths, questions_by_image  # isort: skip
from models import make_model, make_processor  # isort: skip
from small_llava import IGNORE, optimise  # isort: skip
from training import augment, shuffled, train_tower  # isort: skip

Pairs = list[tuple[str, str]]


def load_pixels() -> Tensor:
    """[4000, 3, 64, 64] float in [-1, 1], as the processor normalises."""
    paths = image_paths("train")
    arrays = [np.asarray(Image.open(paths[i]).convert("RGB")) for i in sorted(paths)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def names_in(pairs: Pairs, names: tuple[str, ...]) -> int:
    """The one shape (or colour) that a what-question or its answer names; IGNORE if none does."""
    words = " ".join(f"{q} {a}" for q, a in pairs if q.startswith("what")).replace("?", "").split()
    return next((names.index(word) for word in words if word in names), IGNORE)


class QuestionPacker:
    """Packs an image's questions behind one copy of the image.

    Alone, question tokens attend causally to the image and to their own question, and positions restart
    after the image, so that every question sits where it would sit if nothing else were asked. Otherwise
    the row is an ordinary conversation.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}]}], tokenize=False
        ).removesuffix("<|end|>")
        blank = Image.new("RGB", (64, 64))
        self.prefix = [int(token) for token in processor(text=[text], images=[blank])["input_ids"][0]]
        self.user = processor.tokenizer.convert_tokens_to_ids("<|user|>")

    @cache  # noqa: B019  (107 questions, one packer)
    def tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text)["input_ids"]

    def __call__(self, batch: list[Pairs], *, alone: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """input_ids [B, S], position_ids [B, S], additive attention mask [B, 1, S, S], labels [B, S]."""
        rows = [self._row(pairs, alone=alone) for pairs in batch]
        size = max(len(row[0]) for row in rows)
        fills = (self.processor.tokenizer.pad_token_id, 0, -1, IGNORE)
        ids, positions, owner, labels = (
            torch.tensor([row[i] + [fill] * (size - len(row[i])) for row in rows])
            for i, fill in enumerate(fills)
        )
        same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
        visible = torch.ones(size, size, dtype=torch.bool).tril() & same
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
        return ids, positions, mask, labels

    def _row(self, pairs: Pairs, *, alone: bool) -> tuple[list[int], list[int], list[int], list[int]]:
        start = len(self.prefix)
        ids, positions, owner = list(self.prefix), list(range(start)), [0] * start
        labels = [IGNORE] * start
        for number, (question, answer) in enumerate(pairs, 1):
            asked, said = self.tokens(f"{question}<|end|><|assistant|>"), self.tokens(f"{answer}<|end|>")
            asked = asked if alone or number == 1 else [self.user, *asked]
            first = start if alone else len(ids)
            ids += asked + said
            positions += range(first, first + len(asked) + len(said))
            owner += [number if alone else 0] * (len(asked) + len(said))
            labels += [IGNORE] * (len(asked) - 1) + said + [IGNORE]  # already shifted
        return ids, positions, owner, labels


def negated(question: str) -> bool:
    return " not " in question or " no " in question


def choose(pairs: Pairs, count: int) -> Pairs:
    """Draw up to `count` questions; of the yes-no ones, those that name what is there as often as the others.

    In the data seven colours in eight, and two shapes in three, are not the image's. Left to itself a model
    answers from that, and rests there.
    """

    def draw(pair: tuple[str, str]) -> float:
        question, answer = pair
        names_it = answer == ("no" if negated(question) else "yes")
        names = COLORS if any(color in question for color in COLORS) else SHAPES
        return random.random() ** (1 / (len(names) - 1 if names_it else 1))  # Efraimidis and Spirakis

    return sorted(pairs, key=draw, reverse=True)[:count]


def train_language(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, questions: list[Pairs], epochs: int
) -> None:
    """Stage 2: the language model answers from captions."""
    pack = QuestionPacker(processor)
    # Only images whose shape and colour the questions give away have a caption.
    captions = [
        (pack.tokens(f" {SHAPES[shape]}")[0], pack.tokens(f" {COLORS[color]}")[0], pairs)
        for pairs in questions
        if (shape := names_in(pairs, SHAPES)) != IGNORE and (color := names_in(pairs, COLORS)) != IGNORE
    ]
    language, steps = model.model.language_model, epochs * len(captions) // 32
    done = itertools.count()

    def loss_of(batch: Tensor) -> Tensor:
        affirmative = next(done) < steps // 2
        chosen = [captions[i] for i in batch.tolist()]
        asked = [[p for p in pairs if not (affirmative and negated(p[0]))] for _, _, pairs in chosen]
        ids, positions, mask, labels = pack([choose(pairs, 6) for pairs in asked], alone=True)
        seats = (ids[0] == model.config.image_token_id).nonzero()[:, 0].tolist()
        for row, (shape, color, _) in zip(ids, chosen, strict=True):
            taken = random.sample(seats, random.randint(2, len(seats)))
            row[taken[::2]], row[taken[1::2]] = shape, color
        answers = labels != IGNORE
        hidden = language(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        return F.cross_entropy(model.lm_head(hidden[answers]), labels[answers])

    optimise(language, shuffled(len(captions), 32), loss_of, steps, 1e-3, "language")


def train_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pixels: Tensor,
    questions: list[Pairs],
    epochs: int,
    *,
    part: nn.Module,
    lr: float,
    name: str,
) -> None:
    """Stages 3 and 4: `part` of the model learns to answer up to six questions per image."""
    pack = QuestionPacker(processor)

    def loss_of(batch: Tensor) -> Tensor:
        pairs = [choose(questions[i], 6) for i in batch.tolist()]
        ids, positions, mask, labels = pack(pairs, alone=random.random() < 0.5)
        images, _ = augment(pixels[batch], channels=False)
        answers = labels != IGNORE
        output = model(
            input_ids=ids,
            pixel_values=images,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=answers,
        )
        return F.cross_entropy(output.logits.flatten(0, -2), labels[answers])

    model.requires_grad_(False)
    part.requires_grad_(True)
    optimise(part, shuffled(len(pixels), 32), loss_of, epochs * len(pixels) // 32, lr, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "teacher")
    parser.add_argument("--tower-epochs", type=int, default=100)
    parser.add_argument("--language-epochs", type=int, default=10)
    parser.add_argument("--projector-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="other counts round differently")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)

    grouped = questions_by_image("train")
    questions = [grouped[i] for i in sorted(grouped)]
    texts = [
        f"{turn['value']}".replace("<image>\n", "") for pairs in questions for turn in conversation(pairs)
    ]
    processor = make_processor(texts)
    model = make_model(processor, vision_layers=4, text_layers=4, text_width=192)
    pixels = load_pixels()
    shapes = torch.tensor([names_in(pairs, SHAPES) for pairs in questions])
    colors = torch.tensor([names_in(pairs, COLORS) for pairs in questions])
    train_tower(model, pixels, shapes, colors, options.tower_epochs * len(pixels) // 64)
    train_language(model, processor, questions, options.language_epochs)
    answers = partial(train_answers, model, processor, pixels, questions)
    projector = model.model.multi_modal_projector
    answers(options.projector_epochs, part=projector, lr=2e-3, name="projector")
    answers(options.epochs, part=model, lr=1e-3, name="answers")
    model.half().save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"saved {options.out}; its accuracy: cachekd eval --model {options.out} --data <test tar>")


if __name__ == "__main__":
    main()
