"""Train the demo's starting student, reproducibly, on a CPU.

    python examples/easy_vqa/train_base.py --out examples/easy_vqa/student
    python examples/easy_vqa/train_base.py --tokenizer pieces --out runs/easy-vqa/student-pieces

As a small VLM is before it is fine-tuned: it knows words and captions, and was never asked about a picture.
Nothing of easy-VQA is used but the teacher's tokenizer: no picture, question or answer, of neither split.
With `--tokenizer pieces` that student gets a tokenizer and a chat template of its own (`models.py`). Its
tower stays as it is, bit by bit. All else but the embeddings begins with its weights, and goes through
stages 2 and 3 again, in fewer steps.

1. The vision tower learns to name what a caption names, in pictures that `draw` draws.
2. The language model learns from chats about a description: it says it in other words, or answers questions
   whose wordings are not easy-VQA's. Bare ones come first ("a red?"): whether a word has come before is what
   all others rest on. Negated ones come last, as in `train_teacher.py`, for the same reason.
3. The projector learns to put a picture where the language model then writes its caption; the rest is frozen.
"""

from __future__ import annotations

import argparse
import itertools
import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from data import COLORS, SHAPES  # isort: skip
from models import PIECES, make_model, make_pieces_processor  # isort: skip
from small_llava import IGNORE, IMAGE_SIZE, MARKUP, Markup, optimise  # isort: skip
from training import augment, shuffled, train_tower  # isort: skip

TEACHER = Path(__file__).parent / "teacher"
STUDENT = Path(__file__).parent / "student"
DESCRIPTIONS = ("a {color} {shape}", "the {shape} is {color}", "the image contains a {color} {shape}")
OPEN = {"the shape?": "{shape}", "the color?": "{color}"}
BARE = ("a {thing}?",)
AFFIRMATIVE = ("a {thing} present?", "does it contain a {thing}?")
NEGATED = ("no {thing} present?", "does it not contain a {thing}?")


def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pictures of one shape on a light ground.

    Returns:
        pixels [count, 3, 64, 64] in [-1, 1], as the processor normalises; shapes and colors [count]: indices.
    """
    shapes = [random.randrange(len(SHAPES)) for _ in range(count)]
    colors = [random.randrange(len(COLORS)) for _ in range(count)]
    arrays = [np.asarray(picture(SHAPES[s], COLORS[c])) for s, c in zip(shapes, colors, strict=True)]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, torch.tensor(shapes), torch.tensor(colors)


def picture(shape: str, color: str) -> Image.Image:
    """One picture: the shape's size, place and proportions are random."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(random.randint(226, 255) for _ in range(3)))
    width, height = random.randint(10, 32), random.randint(10, 32)
    if shape != "rectangle":
        height = width
    left, top = random.randint(0, IMAGE_SIZE - width), random.randint(0, IMAGE_SIZE - height)
    right, bottom = left + width, top + height
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=color)
    elif shape == "rectangle":
        pen.rectangle((left, top, right, bottom), fill=color)
    else:
        pen.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=color)
    return image


def description(shape: str, color: str) -> str:
    return random.choice(DESCRIPTIONS).format(shape=shape, color=color) + "."


def question_about(shape: str, color: str, *, negated: bool, bare: bool) -> tuple[str, str]:
    """A question and its answer; of those with yes or no, as many of either."""
    if random.random() < 0.15:
        question, answer = random.choice(list(OPEN.items()))
        return question, answer.format(shape=shape, color=color)
    names, true = random.choice(((SHAPES, shape), (COLORS, color)))
    there = random.random() < 0.5
    name = true if there else random.choice([other for other in names if other != true])
    thing = name if bare or names is SHAPES else f"{name} shape"
    wordings = BARE if bare else NEGATED if negated else AFFIRMATIVE
    return random.choice(wordings).format(thing=thing), "yes" if there != negated else "no"


def chat(markup: Markup, *, negated: bool, bare: bool) -> list[tuple[str, bool]]:
    """A description, said again in other words or asked about six times; of each piece, is it learned?"""
    shape, color = random.choice(SHAPES), random.choice(COLORS)
    told = " ".join(description(shape, color) for _ in range(random.randint(1, 3)))
    pieces = [(f"{markup.first}{told}", True)]
    if random.random() < 0.3:
        again = f"{markup.blank}{description(shape, color)}{markup.end}"
        return [*pieces, (markup.assistant, False), (again, True)]
    for turn in range(6):
        question, answer = question_about(shape, color, negated=negated and random.random() < 0.5, bare=bare)
        asked = f"{markup.user}{question}" if turn else f"\n{question}"
        pieces += [(f"{asked}{markup.assistant}", False), (f"{markup.blank}{answer}{markup.end}", True)]
    return pieces


def train_language(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, markup: Markup, steps: int
) -> None:
    """Stage 2: the language model, on chats: bare questions, then whole ones, then negated ones too."""
    encode = cache(lambda text: processor.tokenizer(text)["input_ids"])
    done = itertools.count()

    def loss_of(batch: Tensor) -> Tensor:
        share = next(done) / steps
        rows = [chat(markup, negated=share >= 0.6, bare=share < 0.4) for _ in batch]
        ids = padded([[token for text, _ in row for token in encode(text)] for row in rows], 0)
        said = [[token if told else IGNORE for text, told in row for token in encode(text)] for row in rows]
        labels = padded(said, IGNORE)[:, 1:]
        hidden = model.model.language_model(input_ids=ids).last_hidden_state[:, :-1]
        learned = labels != IGNORE
        return F.cross_entropy(model.lm_head(hidden[learned]), labels[learned])

    text_side = nn.ModuleList([model.model.language_model, model.lm_head])
    optimise(text_side, shuffled(32, 32), loss_of, steps, 1e-3, "language")


def padded(rows: list[list[int]], fill: int) -> Tensor:
    """[B, S] int, filled on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def train_projector(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    markup: Markup,
    pixels: Tensor,
    shapes: Tensor,
    colors: Tensor,
    steps: int,
) -> None:
    """Stage 3: the projector, on captions of the same pictures."""
    tokenizer = processor.tokenizer
    images = "<image>" * model.config.image_seq_length
    prompt = f"{markup.first.rstrip()}{images}{markup.assistant}"
    shown = tokenizer(prompt, return_tensors="pt")["input_ids"]

    def loss_of(batch: Tensor) -> Tensor:
        names = zip(shapes[batch].tolist(), colors[batch].tolist(), strict=True)
        texts = (f"{markup.blank}{description(SHAPES[s], COLORS[c])}{markup.end}" for s, c in names)
        captions = [tokenizer(text)["input_ids"] for text in texts]
        ids, labels = padded(captions, 0), padded(captions, IGNORE)
        images, _ = augment(pixels[batch], channels=False)
        output = model(input_ids=torch.cat([shown.expand(len(ids), -1), ids], 1), pixel_values=images)
        logits = output.logits[:, shown.shape[1] - 1 : -1]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    model.requires_grad_(False)
    projector = model.model.multi_modal_projector
    projector.requires_grad_(True)
    optimise(projector, shuffled(len(pixels), 32), loss_of, steps, 2e-3, "projector")


def with_tokenizer_of(processor: LlavaProcessor, markup: Markup) -> LlavaForConditionalGeneration:
    """The demo's starting student for another tokenizer: what a token means to begin with is the mean of what
    its pieces in the old tokenizer mean (as in Gee et al. 2022, "Fast vocabulary transfer")."""
    tokenizer, old = processor.tokenizer, AutoProcessor.from_pretrained(STUDENT).tokenizer
    student = LlavaForConditionalGeneration.from_pretrained(STUDENT, dtype=torch.float32)
    model = make_model(processor, vision_layers=2, text_layers=2, text_width=96)
    model.load_state_dict(student.state_dict())
    before, known = student.get_input_embeddings().weight, old.get_vocab()
    names = dict(zip(markup.special_tokens, ("<pad>", MARKUP.user, "<image>", MARKUP.end), strict=True))
    with torch.no_grad():
        for piece, number in tokenizer.get_vocab().items():
            piece = names.get(piece, piece)
            ids = [known[piece]] if piece in known else old(tokenizer.decode([number]))["input_ids"]
            model.get_input_embeddings().weight[number] = before[ids].mean(0)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=STUDENT)
    parser.add_argument("--tokenizer", choices=["teacher", "pieces"], default="teacher")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--language-steps", type=int, help="default: 1500, or 1000 with another tokenizer")
    parser.add_argument("--projector-steps", type=int, help="default: 600, or 200 with another tokenizer")
    parser.add_argument("--threads", type=int, default=1, help="other counts round differently")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)

    if options.tokenizer == "teacher":
        processor, markup, steps = AutoProcessor.from_pretrained(TEACHER), MARKUP, (1500, 600)
        model = make_model(processor, vision_layers=2, text_layers=2, text_width=96)
    else:
        processor, markup, steps = make_pieces_processor(), PIECES, (1000, 200)
        model = with_tokenizer_of(processor, markup)
    pictures = draw(options.pictures)
    if options.tokenizer == "teacher":
        with torch.random.fork_rng(devices=[]):  # what later stages draw does not depend on its length
            train_tower(model, *pictures, options.tower_steps)
    train_language(model, processor, markup, options.language_steps or steps[0])
    train_projector(model, processor, markup, *pictures, options.projector_steps or steps[1])
    model.half().save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"saved {options.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
