"""The disk that a cache takes, and rough time: arithmetic over parameters and tokens, nothing that was run.

A forward costs two operations for each parameter and token. Forward and backward are three forwards for what
trains, two for what is frozen but lets the gradient through; recomputed layers are one more.
docs/how-to/paper-pair.md computes it in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

from cachekd.config.fields import StudentPart
from cachekd.presets.sample import Assumed, Read

# Of `--tail bytes=64`: 109 were measured with a vocabulary of 49,152; a larger one makes ids larger.
BYTES_PER_TOKEN = 112
# Sustained, of bfloat16, by card: a share of the peak that such cards reach in practice.
TFLOPS = {24: 50, 48: 100, 80: 300}
Parts = dict[StudentPart, int]


@dataclass(frozen=True)
class Cost:
    """Of all samples.

    Attributes:
        cache_bytes: of the cache.
        dump_operations, train_operations: of the dump, and of an epoch.
        tflops: sustained.
    """

    cache_bytes: int
    dump_operations: float
    train_operations: float
    tflops: float

    @property
    def dump_seconds(self) -> float:
        """Of the dump."""
        return self.dump_operations / self.tflops / 1e12

    @property
    def train_seconds(self) -> float:
        """Of an epoch."""
        return self.train_operations / self.tflops / 1e12


def cost_of(
    teacher: Parts,
    student: Parts,
    theirs: Read,
    ours: Read,
    assumed: Assumed,
    *,
    switched: bool,
    recomputed: bool,
    tflops: float,
) -> Cost:
    """Estimate it.

    Args:
        teacher, student: parameters by part.
        theirs, ours: the sample as either reads it.
        switched: whether P_T and L_T run in each step.
        recomputed: whether layers are recomputed in the backward.
    """
    dump = _forward(teacher, theirs)
    step = (3 + recomputed) * _forward(student, ours)
    if switched:
        step += (2 + recomputed) * _forward(teacher, theirs, tower=False)
    return Cost(
        cache_bytes=BYTES_PER_TOKEN * assumed.answers * assumed.samples,
        dump_operations=dump * assumed.samples,
        train_operations=step * assumed.samples,
        tflops=tflops,
    )


def _forward(parts: Parts, read: Read, *, tower: bool = True) -> float:
    seen = parts["vision_encoder"] * read.patches if tower else 0
    return 2.0 * (seen + (parts["projector"] + parts["language_model"]) * len(read.encoded))
