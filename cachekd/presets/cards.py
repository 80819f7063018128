"""How to train a pair on a card: the first of several ways whose step fits by reckoning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cachekd.check.memory import StepMemory, StepSetting, step_memory
from cachekd.config import TrainConfig
from cachekd.data import Encoded
from cachekd.models import empty_model
from cachekd.models.quantization import stored_bytes

CARDS = (24, 48, 80)  # GB
ROOM = 0.9  # of a card: the rest is CUDA's, the allocator's, and what nobody reckons
SAMPLES = 32  # of an optimizer step
_BATCHES = (4, 2, 1)
_DOUBLINGS = 2  # of the first of them, where there is room
_HALF = torch.bfloat16
_Tried = tuple[dict[str, Any], StepMemory | None]

_BF16 = {"student_dtype": "bfloat16"}
_8BIT_ADAM = {**_BF16, "training": {"optim": "adamw_8bit"}}
_4BIT = {"teacher_quantization": "4bit"}
_LORA = {
    **_BF16,
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "learning_rate": 1.0e-4,
}
# From what learns best to what takes least. A whole student comes before adapters, and the teacher in
# bfloat16 before one in 4 bits.
WAYS: tuple[dict[str, Any], ...] = (
    {},
    _BF16,
    _8BIT_ADAM,
    {**_BF16, **_4BIT},
    {**_8BIT_ADAM, **_4BIT},
    _LORA,
    {**_LORA, **_4BIT},
    {**_LORA, **_4BIT, "student_quantization": "4bit"},
)


@dataclass(frozen=True)
class Chosen:
    """What is set for a card.

    Attributes:
        card: GB.
        train: settings of the train step.
        dump: settings of the dump step.
        memory: of the step, by part; None where it cannot be reckoned for these families.
        teacher_bytes: the whole teacher's in bfloat16, as the dump has it.
    """

    card: int
    train: dict[str, Any]
    dump: dict[str, Any]
    memory: StepMemory | None
    teacher_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the step is within the card, as far as is known."""
        return self.memory is None or self.memory.peak <= room_of(self.card)


def room_of(card: int) -> float:
    """Bytes of a card that a step may take."""
    return card * 1e9 * ROOM


class Reckoner:
    """Reckons steps of one pair, each once.

    Args:
        teacher, student: configs.
        sample, as_teacher: one sample, as the student and as the teacher reads it.
        switched: whether L_VSD is on; else no teacher is in memory.
    """

    def __init__(
        self, teacher: Any, student: Any, sample: Encoded, as_teacher: Encoded, *, switched: bool
    ) -> None:
        self._teacher, self._student = teacher, student
        self._sample, self._as_teacher, self._switched = sample, as_teacher, switched
        self._found: dict[tuple[str, bool], StepMemory | None] = {}  # a run takes seconds

    @cached_property
    def teacher_bytes(self) -> int:
        """The whole teacher, vision encoder and all, in bfloat16."""
        return stored_bytes(empty_model(self._teacher, dtype=_HALF))

    def choose(self, card: int) -> Chosen:
        """The first way that fits; where none does, the last one, of the smallest batch."""
        room = room_of(card)
        dump = {} if self.teacher_bytes < room else {"device_map": "auto"}
        train, memory = self._faster(*self._first_that_fits(room), room)
        return Chosen(card, train, dump, memory, self.teacher_bytes)

    def _first_that_fits(self, room: float) -> _Tried:
        for way in self._ways():
            if self._at_least(way) > room:
                continue
            for batch in _BATCHES:
                train = {**way, **_with_batch(batch), "gradient_checkpointing": True}
                memory = self._step(train)
                if memory is None or memory.peak <= room:
                    return train, memory
                if _beyond_help(memory, batch, room):
                    break
        train = {**self._ways()[-1], **_with_batch(1), "gradient_checkpointing": True}
        return train, self._step(train)

    def _ways(self) -> list[dict[str, Any]]:
        """Without a teacher in memory, its bits are of no matter."""
        if self._switched:
            return list(WAYS)
        return [way for way in WAYS if "student_quantization" in way or "teacher_quantization" not in way]

    def _faster(self, train: dict[str, Any], memory: StepMemory | None, room: float) -> _Tried:
        """Where there is room left: nothing is recomputed, and batches are larger."""
        best = train, memory
        plain = {**train, "gradient_checkpointing": False}
        # What a forward leaves is at least three times what it leaves where layers are recomputed.
        for wish, grows_by in ((plain, 2), *((None, 1),) * _DOUBLINGS):
            train, memory = best
            if memory is None:
                break
            tried = wish or {**train, **_with_batch(2 * train["batch_size"])}
            if memory.peak + grows_by * (memory.activations + memory.switched) > room:
                continue
            found = self._step(tried)
            if found is not None and found.peak <= room:
                best = tried, found
        return best

    def _at_least(self, way: dict[str, Any]) -> int:
        """Weights, gradients and moments, without a run: it takes milliseconds, a run takes seconds."""
        setting = _setting(way, self._switched)
        ours = empty_model(self._student, dtype=setting.student_dtype)
        held = stored_bytes(ours, setting.student_bits)
        if setting.lora is None:
            held += sum(p.nbytes + p.numel() * setting.optimizer_bytes for p in ours.parameters())
        if self._switched:
            held += stored_bytes(empty_model(self._teacher, dtype=_HALF), setting.teacher_bits, tower=False)
        return held

    def _step(self, train: dict[str, Any]) -> StepMemory | None:
        setting, recomputed = _setting(train, self._switched), train["gradient_checkpointing"]
        key = repr(setting), recomputed
        if key not in self._found:
            found = step_memory(
                self._student,
                self._teacher,
                self._sample,
                setting,
                as_teacher=self._as_teacher,
                recomputed=(recomputed,),
            )
            self._found[key] = found.get(recomputed)
        return self._found[key]


def _beyond_help(memory: StepMemory, batch: int, room: float) -> bool:
    """Whether even a batch of one would be too much: only what grows with the batch can go."""
    grows = memory.activations + memory.switched + memory.logits + memory.gradients
    return memory.peak - grows * (1 - 1 / batch) > room


def _with_batch(batch: int) -> dict[str, Any]:
    return {"batch_size": batch, "gradient_accumulation": SAMPLES // batch}


def _setting(train: dict[str, Any], switched: bool) -> StepSetting:
    said = {**train, "lambda_vsd": 1.0 if switched else 0.0}
    return StepSetting.of(TrainConfig(student="student", data="data", out="run", **said), _HALF)
