"""What the benchmarks of stage two share: LLaVAs with random weights, a batch, ours and the naive trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from cachekd.data import Encoded, predicting_positions
from cachekd.losses import cross_entropy_loss, dbild_loss
from cachekd.losses.targets import DenseTargets
from cachekd.models import SwitchedTeacher, capture_vision
from cachekd.train import SwitchKDTrainer, SwitchKDTrainingArguments
from cachekd.train.batch import Example, batch_of
from cachekd.train.terms import LossTerms

WINDOW, MIN_K, IMAGE_TOKEN = 128, 2, 5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tower:
    """A vision encoder; `width` is what the switch needs to be the same in both models."""

    layers: int
    width: int
    heads: int = 2
    image: int = 32
    patch: int = 8

    @property
    def tokens(self) -> int:
        """Per image."""
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class Text:
    """A language model."""

    layers: int
    width: int
    heads: int = 2
    inner: float = 2.0


def save_vlm(folder: Path, vocab: int, tower: Tower, text: Text, *, seed: int, tied: bool = False) -> None:
    """A LLaVA with random weights."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower.width,
            intermediate_size=2 * tower.width,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.image,
            patch_size=tower.patch,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab,
            hidden_size=text.width,
            intermediate_size=int(text.inner * text.width),
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.heads,
            tie_word_embeddings=tied,
        ),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def random_samples(count: int, length: int, vocab: int, tower: Tower) -> list[Encoded]:
    """Random tokens after an image; the second half of each is the answer."""
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for index in range(count):
        ids = torch.randint(IMAGE_TOKEN + 1, vocab, (length,), generator=generator)
        ids[: tower.tokens] = IMAGE_TOKEN
        pixels = torch.randn(1, 3, tower.image, tower.image, generator=generator)
        supervised = torch.arange(length) >= length // 2
        encoded.append(Encoded(str(index), bytes(16), {"input_ids": ids, "pixel_values": pixels}, supervised))
    return encoded


class Examples(Dataset):
    """The same batch in every step."""

    def __init__(self, examples: list[Example], steps: int) -> None:
        self.examples = examples * steps

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def lean_trainer(
    student: nn.Module,
    data: Dataset,
    out: Path,
    *,
    batch: int,
    settings: Any = None,
    callbacks: Any = None,
    **ours: Any,
) -> SwitchKDTrainer:
    """cachekd's trainer, without checkpoints and with a log at the end of so many steps.

    Args:
        data: of `Example`, such as `Examples`.
        batch: samples in one.
        settings: of `SwitchKDTrainingArguments`, beside those here.
        callbacks: the Trainer's.
        ours: of `LossTerms`.
    """
    arguments = SwitchKDTrainingArguments(
        str(out),
        **{
            "per_device_train_batch_size": batch,
            "num_train_epochs": 1,
            "lr_scheduler_type": "constant",  # as the naive trainer has it
            "save_strategy": "no",
            "logging_steps": 1,
            "logging_first_step": False,  # an entry is the mean of all steps since the last one
            "dataloader_pin_memory": False,
            "train_sampling_strategy": "sequential",
            **(settings or {}),
        },
    )
    return SwitchKDTrainer(LossTerms(student, **ours), arguments, data, pad_token_id=0, callbacks=callbacks)


class Naive:
    """As anyone would first write it: two whole models, logits of every position, all answers at once."""

    def __init__(
        self,
        student: LlavaForConditionalGeneration,
        teacher: LlavaForConditionalGeneration,
        data: list[Encoded],
        autocast: torch.dtype | None = None,
    ) -> None:
        self.student, self.teacher, self.switched = student, teacher, SwitchedTeacher(teacher)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)  # as the Trainer
        inputs = batch_of([Example(encoded) for encoded in data], 0).to(student.device).student
        self.supervised, self.inputs = inputs.supervised, inputs.tensors
        self.autocast = autocast

    def loss(self) -> Tensor:
        """L_CE + L_Align + L_VSD, means over answer tokens."""
        positions, ids = predicting_positions(self.supervised), self.inputs["input_ids"][self.supervised]
        pixels = self.inputs["pixel_values"].to(self.teacher.dtype)
        with torch.no_grad():
            logits = self.teacher(**self.inputs | {"pixel_values": pixels}).logits
            targets = DenseTargets(logits[positions], ids)
        autocast = torch.autocast(self.student.device.type, self.autocast, enabled=self.autocast is not None)
        with autocast, capture_vision(self.student) as vision:
            logits = self.student(**self.inputs).logits[positions]
        assert vision.output is not None
        everywhere = torch.ones_like(positions)
        other = self.switched.logits(vision.output, self.inputs, everywhere)[positions.flatten()]
        return cross_entropy_loss(logits, ids) + sum(
            dbild_loss(z, targets, window=WINDOW, min_k=MIN_K) for z in (logits, other)
        )

    def step(self) -> float:
        """One optimizer step; its loss."""
        loss = self.loss()
        loss.backward()
        self.update()
        return loss.item()

    def update(self) -> None:
        """Clipping and AdamW."""
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
