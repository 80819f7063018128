"""What a run cost: optimizer steps, seconds, floating point operations, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from cachekd.atomic import commit
from cachekd.models.device import peak_memory, reset_peak
from cachekd.train.flops import FlopCounter

COST_FILE = "cachekd_cost.json"  # in a checkpoint: what the steps up to it cost
COUNTED = 2  # batches of a kind whose operations are counted


class Cost(BaseModel):
    """What the steps cost that made a student.

    Attributes:
        steps: of the optimizer.
        seconds: that they took, with evaluations on held-out data and checkpoints between them, but not what
            was loaded before. Steps that a kill undid, and that were done again, are counted once.
        sessions: which sessions' seconds these are. "last": a session of an earlier version of cachekd
            trained before and left no note of its own; its steps are missing in the seconds and the memory.
        tokens: that the student read, padding and image tokens included, of all processes.
        flops: floating point operations of all training: student forward and backward, what gradient
            checkpointing computes again, the switched path, a live teacher. Only products of matrices are
            counted (`FlopCounter`: linear layers, attention, convolutions), in the first `COUNTED` batches
            with the same terms of the loss; that is scaled by tokens. So it is exact where all
            batches have the same shape. Attention's part grows faster than the tokens, and pictures count as
            if all batches had the same share of them: where lengths and pictures are mixed it is an estimate.
            Neither the optimizer, nor held-out data, nor the dump's own forward is in it.
        uncounted: why `flops` is None, where it is.
        peak_bytes: the most memory at a time, models included: of the accelerator, or without one the
            process' resident set (which has in it what the process kept of earlier work); of the first
            process of several. None where the system cannot tell this run from what was before.
    """

    steps: int
    seconds: float
    sessions: Literal["all", "last"] = "all"
    tokens: int
    flops: float | None = None
    uncounted: str | None = None
    peak_bytes: int | None = None


class _Work(BaseModel):
    """Batches of one kind: the tokens of all, and of those whose operations were counted."""

    tokens: int = 0
    batches: int = 0  # counted, as the next two
    counted: int = 0
    flops: int = 0

    @property
    def estimate(self) -> float:
        """Operations of all."""
        return self.flops / self.counted * self.tokens if self.counted else 0.0


class _Spent(BaseModel):
    """What checkpoints carry."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    sessions: Literal["all", "last"] = "all"
    first_step: int | None = None  # that is in it
    kinds: dict[str, _Work] = {}


class CostMeter:
    """Looks on while a run trains.

    Args:
        processes: that share the run, each with as many tokens.
        uncounted: why operations cannot be counted here; None: they can.
    """

    def __init__(self, *, processes: int = 1, uncounted: str | None = None) -> None:
        self._processes, self._uncounted = processes, uncounted
        self._spent = _Spent()
        self._started: float | None = None
        self._has_peak = False

    def begin(self) -> None:
        """Training begins, or goes on, now."""
        self._has_peak = reset_peak()
        self._started = time.perf_counter()

    @contextmanager
    def batch(self, tokens: int, step: int, kind: str) -> Iterator[None]:
        """Within, forward and backward of one batch run.

        Args:
            tokens: of the student, padding included.
            step: of the optimizer, the first is 0.
            kind: what is computed; batches of one kind take as much a token.
        """
        if self._spent.first_step is None:
            self._spent.first_step = step
        work = self._spent.kinds.setdefault(kind, _Work())
        if self._uncounted is None and work.batches < COUNTED and tokens:
            with FlopCounter() as counter:
                yield
            work.flops += counter.flops
            if counter.failed is not None:
                self._uncounted = f"{counter.failed} could not be counted"
            work.counted += tokens
            work.batches += 1
        else:
            yield
        work.tokens += tokens

    def cost(self, steps: int) -> Cost:
        """What the steps so far cost.

        Args:
            steps: of the optimizer, those of earlier sessions included.
        """
        spent = self._now()
        # Steps of which nothing is known had as many tokens as the others.
        share = steps / max(1, steps - (spent.first_step or 0)) * self._processes
        flops = share * sum(work.estimate for work in spent.kinds.values())
        uncounted = self._uncounted or (None if flops else "no step was done that could be counted")
        return Cost(
            steps=steps,
            seconds=spent.seconds,
            sessions=spent.sessions,
            tokens=round(share * sum(work.tokens for work in spent.kinds.values())),
            flops=None if uncounted else flops,
            uncounted=uncounted,
            peak_bytes=spent.peak_bytes,
        )

    def _now(self) -> _Spent:
        if self._started is None:
            return self._spent
        seconds = self._spent.seconds + time.perf_counter() - self._started
        peak = max(peak_memory(), self._spent.peak_bytes or 0) if self._has_peak else None
        return self._spent.model_copy(update={"seconds": seconds, "peak_bytes": peak})

    def save(self, checkpoint: Path) -> None:
        """Note in a checkpoint what led to it."""
        commit(checkpoint / COST_FILE, self._now().model_dump_json(indent=1).encode())

    def load(self, checkpoint: Path) -> None:
        """Go on from what led to a checkpoint, if it says that."""
        try:
            self._spent = _Spent.model_validate_json((checkpoint / COST_FILE).read_bytes())
        except (OSError, ValidationError):  # of an earlier version; a cost is no reason to stop a run
            self._spent = _Spent(sessions="last")
