"""The terms on held-out data, while a student trains."""

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

from cachekd.data import SampleEncoder
from cachekd.data.loader import WorkerLoader
from cachekd.errors import CachekdError, about
from cachekd.losses.terms import TERMS
from cachekd.models.split import in_eval_mode
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
    def of(cls, held_out: HeldOut, teacher_encoder: SampleEncoder | None) -> Validation:
        """Of what was opened.

        Args:
            teacher_encoder: of the training data, where the teacher has its own.
        """
        encoder, cache = held_out.encoder, held_out.cache
        theirs = None
        if teacher_encoder is not None and any(TERMS[name].taught for name in held_out.terms):
            theirs = SampleEncoder(teacher_encoder.processor, encoder.limits)
        data = TrainingSamples(held_out.samples, encoder, cache, theirs, on_error=held_out.on_error)
        return cls(data, held_out.terms, encoder.pad_token_id)

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
        """This process's batches, as indices."""
        size, processes = args.per_device_eval_batch_size, args.world_size
        indices = list(range(len(self.data)))
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        batches += [[] for _ in range(-len(batches) % processes)]
        return batches[args.process_index :: processes]

    def __call__(self, trainer: SwitchKDTrainer, prefix: str = "eval") -> dict[str, float]:
        """One evaluation; all processes take part, and get the same.

        Args:
            prefix: of the names.

        Returns:
            `eval_loss`, the weighted sum of the terms; each term, the mean per answer token (of a taught one:
            of those that the teacher covers); `eval_token_accuracy`, the share of answer tokens whose
            argmax is right; `eval_runtime` in seconds.

        Raises:
            CachekdError: no answer token is left to be evaluated; what is wrong with a sample.
        """
        started = time.perf_counter()
        with about("eval_data"), undisturbed(trainer):
            sums = self.sums(trainer, self.batches(trainer.args))
        *totals, right, tokens, distilled = trainer.accelerator.reduce(sums).tolist()
        divisors = [distilled if TERMS[name].taught else tokens for name in self.terms]
        if not all(divisors):
            raise CachekdError(
                "no answer token of the held-out data is left to be evaluated",
                where=f"setting 'eval_data', {len(self.data):,} samples",
                found=f"{len(self._feed.bad.reasons):,} of them cannot be used",
            )
        means = {name: t / n for name, t, n in zip(self.terms, totals, divisors, strict=True)}
        loss = sum(trainer.weights[name] * mean for name, mean in means.items())
        if not math.isfinite(loss) and trainer.is_world_process_zero():
            terms = ", ".join(f"{name} {mean:g}" for name, mean in means.items())
            log.warning("step %s: eval_loss is not finite: %s", f"{trainer.state.global_step:,}", terms)
        seconds = time.perf_counter() - started
        found = {"loss": loss, **means, ACCURACY: right / tokens, "runtime": seconds}
        return {f"{prefix}_{name}": value for name, value in found.items()}

    def sums(self, trainer: SwitchKDTrainer, batches: Iterable[Batch]) -> Tensor:
        """[T + 3] float64, over these batches: of the T terms, of tokens whose argmax is right, the answer
        tokens, and those of them that the teacher covers."""
        args = trainer.args
        sums = torch.zeros(len(self.terms) + 3, dtype=torch.float64, device=args.device)
        for batch in batches:
            found = trainer.terms_of(trainer.model, batch, evaluating=True)
            terms = [found.terms.get(name, 0.0) for name in self.terms]
            row = (*terms, found.right, found.tokens, found.distilled)
            sums += torch.stack([torch.as_tensor(x).to(sums) for x in row])
            trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
        return sums

    def bad_samples(self) -> dict[str, str]:
        """Key and reason of those that cannot be used, in all processes, each of which has to ask."""
        return self._feed.all_bad()


@contextmanager
def undisturbed(trainer: SwitchKDTrainer) -> Iterator[None]:
    """The student as it is used, not as it trains; afterwards everything is as before."""
    optimizer: Any = trainer.optimizer
    schedule_free = callable(getattr(optimizer, "eval", None))  # their weights in use are averages
    python, numpy = random.getstate(), np.random.get_state()
    gpus = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with in_eval_mode(trainer.model), torch.random.fork_rng(gpus), torch.no_grad():
        if schedule_free:
            optimizer.eval()
        try:
            yield
        finally:
            if schedule_free:
                optimizer.train()
            random.setstate(python)
            np.random.set_state(numpy)


def saved_evaluation(args: TrainingArguments, state: TrainerState) -> tuple[dict[str, float], int | None]:
    """What was logged on held-out data of the student that training ended with, nothing if nothing was; and
    its step where that is the best one, not the last."""
    best = state.best_global_step if args.load_best_model_at_end else None
    step = best or state.global_step
    entries = [entry for entry in state.log_history if "eval_loss" in entry and entry["step"] == step]
    return {name: x for entry in entries[-1:] for name, x in entry.items() if name.startswith("eval_")}, best
