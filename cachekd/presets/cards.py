"""How to train a pair on a card: the first of several ways whose step fits, as computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from cachekd.check.memory import MOMENTS, StepMemory, StepSetting, step_memory
from cachekd.config import TrainConfig
from cachekd.data import Encoded
from cachekd.models import empty_model
from cachekd.models.quantization import stored_bytes

CARDS = (24, 48, 80)  # GB
ROOM = 0.9  # of a card: the rest is CUDA's, the allocator's, and what is not computed
SAMPLES = 32  # of an optimizer step
# Samples, and whether layers are recomputed: the fastest first.
_BATCHES = ((16, False), (8, False), (4, False), (8, True), (4, True), (2, True), (1, True))
_HALF = torch.bfloat16

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
        memory: of the step, by part; None where it cannot be computed for these families.
        teacher_bytes: the whole teacher's in bfloat16, as the dump has it.
    """

    card: float
    train: dict[str, Any]
    dump: dict[str, Any]
    memory: StepMemory | None
    teacher_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the step is within the card, as far as is known."""
        return self.memory is None or self.memory.peak <= room_of(self.card)


def room_of(card: float) -> float:
    """Bytes of a card that a step may take."""
    return card * 1e9 * ROOM


class Chooser:
    """Chooses how one pair trains, by computing its steps.

    A run on tensors without memory takes seconds. So what larger batches, other moments and other bits would
    take is guessed from runs of one sample and of two; what is chosen has then a run of its own.

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
        self._runs: dict[str, StepMemory | None] = {}
        self._students: dict[torch.dtype, PreTrainedModel] = {}

    @cached_property
    def teacher_bytes(self) -> int:
        """The whole teacher, vision encoder and all, in bfloat16."""
        return stored_bytes(self._theirs)

    @cached_property
    def _theirs(self) -> PreTrainedModel:
        return empty_model(self._teacher, dtype=_HALF)

    def _ours(self, dtype: torch.dtype) -> PreTrainedModel:
        if dtype not in self._students:
            self._students[dtype] = empty_model(self._student, dtype=dtype)
        return self._students[dtype]

    def choose(self, card: float) -> Chosen:
        """The first way that fits; where none does, the last one, of the smallest batch.

        Where a step cannot be computed, the first way whose weights, gradients and moments fit is taken, of
        the smallest batch.
        """
        room = room_of(card)
        dump = {} if self.teacher_bytes < room else {"device_map": "auto"}
        for train in self._likely(room):
            memory = self._run(self._setting(train), recomputed=train["gradient_checkpointing"])
            if memory is None or memory.peak <= room:
                return Chosen(card, train, dump, memory, self.teacher_bytes)
        train = _in_batches(self._ways()[-1], 1, True)
        memory = self._run(self._setting(train), recomputed=True)
        return Chosen(card, train, dump, memory, self.teacher_bytes)

    def _likely(self, room: float) -> Iterator[dict[str, Any]]:
        """What may fit, the best first."""
        for way in self._ways():
            if self._held(way) > room:
                continue
            least = self._guess(_in_batches(way, 1, True))
            if least is None:  # what comes on top of the weights is unknown: as little as there can be
                yield _in_batches(way, 1, True)
                continue
            if least > room:
                continue
            for batch, recomputed in _BATCHES:
                train = _in_batches(way, batch, recomputed)
                if self._may_fit(train, room):
                    yield train

    def _may_fit(self, train: dict[str, Any], room: float) -> bool:
        """Whether a guess is within the room. Without recomputed layers, a forward leaves three times as much
        at least: where that is too much, no run is wasted on it."""
        if not train["gradient_checkpointing"]:
            setting = self._setting({**train, "batch_size": 1})
            one = self._run(self._plain(setting), recomputed=True)
            leaner = self._guess({**train, "gradient_checkpointing": True})
            if one is None or leaner is None:
                return True
            if leaner + 2 * train["batch_size"] * (one.activations + one.switched) > room:
                return False
        guess = self._guess(train)
        return guess is None or guess <= room

    def _guess(self, train: dict[str, Any]) -> float | None:
        """What a step holds at the most: hardly ever more than it does, mostly a little less."""
        setting, recomputed = self._setting(train), train["gradient_checkpointing"]
        plain = self._plain(setting)
        one, two = (self._run(replace(plain, batch_size=batch), recomputed=recomputed) for batch in (1, 2))
        if one is None or two is None:
            return None
        more = setting.batch_size - 2
        grows = two.activations + two.switched - one.activations - one.switched
        by_sample = max(grows, two.peak - one.peak) if more > 0 else two.peak - one.peak
        moments = two.optimizer - two.optimizer // MOMENTS * setting.optimizer_bytes
        return two.peak + more * by_sample - moments - self._fewer_bits(setting)

    def _ways(self) -> list[dict[str, Any]]:
        """Without a teacher in memory, its bits are of no matter."""
        if self._switched:
            return list(WAYS)
        found = [{name: value for name, value in way.items() if name not in _4BIT} for way in WAYS]
        return [way for number, way in enumerate(found) if way not in found[:number]]

    def _held(self, way: dict[str, Any]) -> int:
        """Weights, gradients and moments, of adapters none: without a run."""
        setting = self._setting(way)
        ours = self._ours(setting.student_dtype)
        held = stored_bytes(ours, setting.student_bits)
        if setting.lora is None:
            held += sum(p.nbytes + p.numel() * setting.optimizer_bytes for p in ours.parameters())
        if self._switched:
            held += stored_bytes(self._theirs, setting.teacher_bits, tower=False)
        return held

    def _run(self, setting: StepSetting, *, recomputed: bool) -> StepMemory | None:
        key = repr((setting, recomputed))
        if key not in self._runs:
            self._runs[key] = step_memory(
                self._student,
                self._teacher,
                self._sample,
                setting,
                as_teacher=self._as_teacher,
                recomputed=(recomputed,),
            ).get(recomputed)
        return self._runs[key]

    def _fewer_bits(self, setting: StepSetting) -> int:
        """What quantised weights take less than whole ones."""
        ours = self._ours(setting.student_dtype)
        saved = stored_bytes(ours) - stored_bytes(ours, setting.student_bits)
        if self._switched:
            saved += stored_bytes(self._theirs, tower=False)
            saved -= stored_bytes(self._theirs, setting.teacher_bits, tower=False)
        return saved

    def _plain(self, setting: StepSetting) -> StepSetting:
        """With AdamW's moments and nothing quantised: one run tells of all others."""
        return replace(setting, optimizer_bytes=MOMENTS, teacher_bits=None, student_bits=None)

    def _setting(self, train: dict[str, Any]) -> StepSetting:
        said = {**train, "lambda_vsd": 1.0 if self._switched else 0.0}
        return StepSetting.of(TrainConfig(student="student", data="data", out="run", **said), _HALF)


def _in_batches(way: dict[str, Any], batch: int, recomputed: bool) -> dict[str, Any]:
    return {
        **way,
        "batch_size": batch,
        "gradient_accumulation": SAMPLES // batch,
        "gradient_checkpointing": recomputed,
    }
