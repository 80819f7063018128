"""The student on held-out data every so many steps, and nothing of the training changed by it."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from cachekd.data.batches import BatchLimits
from cachekd.data.left_out import LeftOutSamples
from cachekd.data.loader import WorkerLoader
from cachekd.errors import CachekdError, about
from cachekd.losses.terms import TERMS
from cachekd.models.split import in_eval_mode
from cachekd.train.across import AcrossTokenizers
from cachekd.train.arguments import ACCURACY
from cachekd.train.batch import Batch
from cachekd.train.data import Feed, TrainingSamples
from cachekd.train.held_out import HeldOut

if TYPE_CHECKING:
    from cachekd.train.trainer import SwitchKDTrainer

log = logging.getLogger(__name__)


class Validation:
    """Evaluates a student on held-out data: every process its part of them, no sample twice.

    What is computed does not depend on batches or processes: sums over all answer tokens, divided by their
    number. Training goes on as if nothing had happened: no gradient, no dropout, no random number drawn, no
    batch of its own data asked for.

    Args:
        data: held out.
        terms: that are computed on them, by their names in `TERMS`.
        pad_token_id: for batches.

    Raises:
        CachekdError: no sample of them can be used.
    """

    def __init__(self, data: TrainingSamples, terms: tuple[str, ...], pad_token_id: int) -> None:
        self.data, self.terms = data, terms
        self._feed = Feed(data, pad_token_id)

    @classmethod
    def of(
        cls,
        held_out: HeldOut,
        across: AcrossTokenizers | None,
        *,
        teacher_reads: bool,
        same_tiles: bool = False,
    ) -> Validation:
        """Evaluate what was opened.

        Args:
            across, same_tiles: as for the data that the run trains on.
            teacher_reads: the teacher reads samples by itself (`reading_teacher`).
        """
        (student, teacher), theirs = held_out.models, None
        if teacher_reads and teacher is not None and any(TERMS[name].taught for name in held_out.terms):
            theirs = teacher.encoder
        data = TrainingSamples(
            held_out.samples,
            student.encoder,
            held_out.cache,
            theirs,
            on_error=held_out.on_error,
            across=across,
            same_tiles=same_tiles,
        )
        return cls(data, held_out.terms, student.encoder.pad_token_id)

    def read(self, args: TrainingArguments) -> None:
        """Read this process's part once: what is wrong with a sample is known before the first step, not
        after hours.

        Raises:
            CachekdError: a sample that stops the run, such as one that is not what was dumped.
        """
        for _ in self.batches(args):
            pass

    def batches(self, args: TrainingArguments) -> Iterator[Batch]:
        """This process's part of the data, in as many batches as any other process has: one that has no
        samples left for its last batch computes a stand-in of which nothing counts."""
        loader = WorkerLoader(
            self.data,
            batch_sampler=self.part_of(args),
            collate_fn=self._feed.collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator(),  # else it draws a number of the global one
        )
        return self._feed.batches(iter(loader))

    def part_of(self, args: TrainingArguments) -> list[list[int]]:
        """Cut the data into batches, as indices, and take this process's."""
        size, processes, count = args.per_device_eval_batch_size, args.world_size, len(self.data)
        if tokens := getattr(args, "batch_tokens", None):
            batches = BatchLimits(size, tokens).cut(self.data.lengths())
        else:
            batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
        batches += [[] for _ in range(-len(batches) % processes)]
        return batches[args.process_index :: processes]

    def __call__(self, trainer: SwitchKDTrainer, prefix: str = "eval") -> dict[str, float]:
        """One evaluation; all processes take part, and get the same.

        Args:
            prefix: of the names.

        Returns:
            `eval_loss`, the sum of the terms with the weights of the run's last step; each term, the mean per
            answer token (of a taught one: of those that the teacher covers); `eval_token_accuracy`, the share
            of answer tokens whose argmax is right; `eval_runtime` in seconds.

        Raises:
            CachekdError: no answer token is left to be evaluated; what is wrong with a sample.
        """
        started = time.perf_counter()
        with about("eval_data"), undisturbed(trainer):
            sums = self.sums(trainer, self.batches(trainer.args))
        right, tokens, *rest = trainer.accelerator.reduce(sums).tolist()
        totals, divisors = rest[: len(self.terms)], rest[len(self.terms) :]
        if not all(divisors):
            across = trainer.terms.across is not None and tokens
            none_is_aligned = ", and of the others no answer is aligned with the teacher's" if across else ""
            raise CachekdError(
                "no answer token of the held-out data is left to be evaluated",
                where=f"setting 'eval_data', {len(self.data):,} samples",
                found=f"{len(self._feed.bad.reasons):,} of them cannot be used{none_is_aligned}",
            )
        means = {name: t / n for name, t, n in zip(self.terms, totals, divisors, strict=True)}
        # A schedule's last ones at every evaluation, as these are compared with each other.
        weights = trainer.terms.weights_at(1, 2)
        loss = sum(weights[name] * mean for name, mean in means.items())
        if not math.isfinite(loss) and trainer.is_world_process_zero():
            terms = ", ".join(f"{name} {mean:g}" for name, mean in means.items())
            log.warning("step %s: eval_loss is not finite: %s", f"{trainer.state.global_step:,}", terms)
        seconds = time.perf_counter() - started
        found = {"loss": loss, **means, ACCURACY: right / tokens, "runtime": seconds}
        return {f"{prefix}_{name}": value for name, value in found.items()}

    def sums(self, trainer: SwitchKDTrainer, batches: Iterable[Batch]) -> Tensor:
        """[2 T + 2] float64, over these batches: answer tokens whose argmax is right, answer tokens, the T
        terms, and over how many answer tokens each of them is."""
        args = trainer.args
        sums = torch.zeros(2 * len(self.terms) + 2, dtype=torch.float64, device=args.device)
        for batch in batches:
            found = trainer.terms_of(trainer.model, batch, evaluating=True)
            terms = [found.terms.get(name, 0.0) for name in self.terms]
            counts = [found.counts[name] for name in self.terms]
            row = (found.right, found.tokens, *terms, *counts)
            sums += torch.stack([torch.as_tensor(x).to(sums) for x in row])
            trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
        return sums

    def differing(self) -> LeftOutSamples:
        """Across tokenizers, those whose answers are other bytes for the teacher, in all processes, each of
        which has to ask."""
        return self._feed.notes.of_all().differing

    def bad_samples(self) -> dict[str, str]:
        """Key and reason of those that cannot be used, in all processes, each of which has to ask."""
        return self._feed.all_bad()


@contextmanager
def undisturbed(trainer: SwitchKDTrainer) -> Iterator[None]:
    """The student as it is used, not as it trains; afterwards everything is as before."""
    optimizer: Any = trainer.optimizer
    schedule_free = callable(getattr(optimizer, "eval", None))  # their weights in use are averages
    with in_eval_mode(trainer.model), same_randomness(trainer.args.device), torch.no_grad():
        if schedule_free:
            optimizer.eval()
        try:
            yield
        finally:
            if schedule_free:
                optimizer.train()


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Whatever draws random numbers within, those afterwards are as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()
    gpus = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(gpus, device_type=device.type):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def saved_evaluation(args: TrainingArguments, state: TrainerState) -> tuple[dict[str, float], int | None]:
    """What was logged on held-out data of the student that training ended with, nothing if nothing was; and
    its step where that is the best one, not the last."""
    best = state.best_global_step if args.load_best_model_at_end else None
    step = best or state.global_step
    entries = [entry for entry in state.log_history if "eval_loss" in entry and entry["step"] == step]
    return {name: x for entry in entries[-1:] for name, x in entry.items() if name.startswith("eval_")}, best
