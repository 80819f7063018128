"""The terms of one batch, each summed over answer tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cachekd.config.weights import Schedule, highest, weight_at
from cachekd.data.collate import ModelInputs
from cachekd.errors import CachekdError
from cachekd.losses import chunk_tokens, cross_entropy_loss, dbild_loss, summed_over_chunks
from cachekd.losses.cells import OverCells
from cachekd.losses.targets import TeacherTargets
from cachekd.losses.terms import TERMS, labels, options_off
from cachekd.models import (
    DeferredHead,
    LiveTeacher,
    SwitchBridge,
    SwitchedTeacher,
    capture_vision,
    prove_split,
    reach_by_text,
)
from cachekd.train.across import AcrossTokenizers
from cachekd.train.batch import Batch
from cachekd.train.compared import ComparedTokens, Targets
from cachekd.train.sums import BatchTerms

TermLoss = Callable[[Tensor, TeacherTargets], Tensor]

_RIGHT = "right"  # beside the terms, while chunks are summed


class LossTerms:
    """Runs student and switched path, and compares both with the teacher, a few answer tokens at a time.

    Args:
        student: the model to train; a VLM, or one in peft's wrapper.
        weights: of the terms, by the names in `TERMS`, each a number or a schedule; one that is not named is
            off, but L_CE, whose weight is then 1. In a step where a term's weight is 0 it is not computed.
        losses: of the taught terms, by their names: each the sum over n answer tokens, from [n, V] logits and
            the teacher at these. DBiLD where none is named.
        teacher: the switched path; None where no term is of it.
        live: takes the place of cached targets.
        bridge: between V_S and P_T, beyond the paper. It trains with the student (in the same optimizer,
            under the same gradient clip), and is saved in checkpoints, but is no part of it.
        vsd_every: the switched path runs in every so many optimizer steps, the first among them, whatever
            step a run was resumed at. Its weight is the same wherever it runs: docs/how-to/training.md.
        logit_chunk: answer tokens whose logits exist at a time; by default what `chunk_tokens` says.
        across: that teacher and student have different tokenizers; None: both read text alike.

    Raises:
        CachekdError: a term of the switched path is on, and there is no teacher to switch into.
    """

    # Known once `prepare` was called.
    head: DeferredHead
    chunk: int  # answer tokens whose logits exist at a time
    autocast: Callable[[], AbstractContextManager[Any]]

    def __init__(
        self,
        student: nn.Module,
        weights: Mapping[str, float | Schedule],
        losses: Mapping[str, TermLoss] = MappingProxyType({}),
        *,
        teacher: SwitchedTeacher | None = None,
        live: LiveTeacher | None = None,
        bridge: SwitchBridge | None = None,
        vsd_every: int = 1,
        logit_chunk: int | None = None,
        across: AcrossTokenizers | None = None,
    ) -> None:
        self.across, self.compared = across, ComparedTokens(across)
        self.student, self.teacher, self.live, self.bridge = student, teacher, live, bridge
        self.weights: dict[str, float | Schedule] = {**dict.fromkeys(TERMS, 0.0), "ce": 1.0, **weights}
        self.losses = dict.fromkeys(TERMS, partial(dbild_loss, reduction="sum")) | dict(losses)
        self.vsd_every, self._asked_chunk = vsd_every, logit_chunk
        self.own, self.switched = (
            [name for name, term in TERMS.items() if term.path == path and highest(self.weights[name]) > 0]
            for path in ("own", "switched")
        )
        if self.switched and teacher is None:
            raise CachekdError(
                f"the switched path of {labels(self.switched)} needs a teacher to switch into",
                fix="pass teacher=, or no weight for it",
            )
        # The hooks go into the VLM itself; DDP and peft only wrap it.
        self.vlm = student if isinstance(student, PreTrainedModel) else cast(Any, student).get_base_model()
        reach_by_text(self.vlm)
        self._proven = False  # that the student's parts make up the student

    def prepare(self, first: Batch, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Measure both heads and prove the split, before anything long starts.

        Args:
            first: of a sample, on the student's device.
            autocast: of the student's forward.

        Raises:
            CachekdError: the student's parts do not make up the student.
        """
        self.autocast = autocast
        ours, ids = first.student, 0
        if self.teacher is not None:
            theirs = ours if self.across is None or first.teacher is None else first.teacher
            head = self.teacher.head(theirs.tensors, theirs.positions)
            ids = 0 if self.across is None else head.vocab_size
            if self.switched and "pixel_values" in ours.tensors:
                self._prove(ours)
        self.head = DeferredHead(self.vlm, ours.tensors, ours.positions)
        if self.across is not None:
            ids = max(ids, self.across.largest)
        self.chunk = self._asked_chunk or chunk_tokens(max(ids, self.head.vocab_size))

    def require_uncompiled(self) -> None:
        """Refuse to have the student compiled where a term is of the switched path.

        Raises:
            CachekdError: one is.
        """
        if self.switched:
            raise CachekdError(
                f"{labels(self.switched)} cannot be computed: the switched path goes on from inside the "
                "student's forward, and a compiled one does not show what its vision encoder says",
                where="setting 'training.torch_compile'",
                fix=f"leave it out, or train without the switched path: {options_off(self.switched)}",
            )

    @property
    def names(self) -> list[str]:
        """The terms that are on: whose weight is ever above 0."""
        return [*self.own, *self.switched]

    def weights_at(self, step: int, steps: int) -> dict[str, float]:
        """Each term's weight in optimizer step `step` of `steps`, the first of which is 0."""
        return {name: weight_at(weight, step, steps) for name, weight in self.weights.items()}

    def scheduled_at(self, step: int, steps: int) -> dict[str, float]:
        """The weights in that step of the terms that have a schedule, by the names of the settings."""
        weights = self.weights_at(step, steps)
        names = [name for name, weight in self.weights.items() if isinstance(weight, Schedule)]
        return {f"lambda_{name}": weights[name] for name in names}

    def names_at(self, step: int, steps: int) -> list[str]:
        """The terms that are computed in that step."""
        weights = self.weights_at(step, steps)
        path = self.names if step % self.vsd_every == 0 else self.own
        return [name for name in path if weights[name] > 0]

    def _prove(self, inputs: ModelInputs) -> None:
        """Prove the split once, on the first sample with an image."""
        if not self._proven:
            prove_split(self.vlm, inputs.tensors, inputs.positions)
            self._proven = True

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        names: Collection[str] | None = None,
        *,
        evaluating: bool = False,
    ) -> BatchTerms:
        """Terms of one batch, each summed over answer tokens: taught ones over those with targets, across
        tokenizers over those that are aligned.

        Args:
            model: the student in its wrappers.
            names: of the terms; None: those that are on.
            evaluating: a live teacher is asked, whatever the terms are; no gradient is wanted, and the answer
                tokens whose argmax is right are counted.
        """
        inputs, positions = batch.student.tensors, batch.student.positions
        token_ids = batch.student.token_ids
        own, switched = (
            [name for name in path if names is None or name in names] for path in (self.own, self.switched)
        )
        taught = evaluating or any(TERMS[name].taught for name in (*own, *switched))
        targets = self.targets_of(batch) if taught or self.live is None else None
        with capture_vision(self.vlm) as vision:
            states = self.head.states(
                lambda: model(**inputs, logits_to_keep=positions, use_cache=False).logits.flatten(0, -2)
            )
        terms: dict[str, Tensor] = {}
        compares = any(TERMS[name].taught for name in own)
        for rows, known in self.compared.parts(batch, targets, compares=compares):
            some = (states, token_ids) if rows is None else (states[rows], token_ids[rows])
            found = self._own_path(own, *some, known, counts_right=evaluating)
            terms |= {name: terms[name] + x if name in terms else x for name, x in found.items()}
        right = terms.pop(_RIGHT, None)
        # Without an image z_W is z_T: no difference, and no gradient.
        if self.teacher is not None and targets is not None and switched and "pixel_values" in inputs:
            self._prove(batch.student)
            output = self._vision_output(vision.output, with_gradient=not evaluating)
            terms |= self._switched_path(self.teacher, switched, output, batch, targets)
        tokens = len(token_ids)
        counts, divisors = self.compared.counts(batch, targets, tokens), self.compared.divisors(batch, tokens)
        return BatchTerms(terms, right, tokens, counts, divisors)

    def targets_of(self, batch: Batch) -> Targets | None:
        """The teacher at the batch's answer tokens, or at those that the cache covers; None at none."""
        if self.live is None:
            return batch.targets
        if not batch.student.supervised.any():
            return None
        seen = batch.student if batch.teacher is None else batch.teacher
        return self.live.targets(seen.tensors, seen.positions, seen.token_ids)

    def _own_path(
        self,
        names: list[str],
        states: Tensor,
        token_ids: Tensor,
        targets: Targets | OverCells | None,
        *,
        counts_right: bool,
    ) -> dict[str, Tensor]:
        """L_CE and, with targets, the taught terms; and how many answer tokens are the likeliest, if that is
        asked."""
        on = [name for name in names if targets is not None or not TERMS[name].taught]

        def loss(some: Tensor, rows: Tensor) -> dict[str, Tensor]:
            logits = self.head.logits(some)
            terms = self._terms(on, logits, token_ids[rows], targets, rows)
            if counts_right:
                terms[_RIGHT] = (logits.argmax(-1) == token_ids[rows]).sum()
            return terms

        # Around all chunks: the head's weights are cast once.
        with self.autocast():
            return summed_over_chunks(loss, states, self.chunk)

    def _switched_path(
        self,
        teacher: SwitchedTeacher,
        names: list[str],
        output: ModelOutput,
        batch: Batch,
        targets: Targets,
    ) -> dict[str, Tensor]:
        """The terms of what the student's vision encoder says, `output`, in the teacher."""
        inputs = self._switched_inputs(batch)
        if self.bridge is not None:
            output = self.bridge(output)
        positions = inputs.positions
        head = teacher.head(inputs.tensors, positions)
        states = head.states(lambda: teacher.logits(output, inputs.tensors, positions)).to(positions.device)
        states = states if batch.covered is None else states[batch.covered]

        def loss(some: Tensor, rows: Tensor) -> dict[str, Tensor]:
            return self._terms(names, head.logits(some), targets.token_ids[rows], targets, rows)

        return summed_over_chunks(loss, states, self.chunk)

    def _switched_inputs(self, batch: Batch) -> ModelInputs:
        """The text that the teacher's language model reads around the student's visual features."""
        if batch.teacher is None:
            return batch.student
        if self.bridge is not None and (self.across is None or self.bridge.plan.other_text):
            return batch.teacher  # its own number of places for an image
        return batch.student if self.across is None else batch.teacher.with_pictures_of(batch.student)

    def _terms(
        self,
        names: list[str],
        logits: Tensor,
        token_ids: Tensor,
        targets: Targets | OverCells | None,
        rows: Tensor,
    ) -> dict[str, Tensor]:
        """Terms of one path, each summed over the answer tokens `rows` [n] int64.

        Args:
            logits: [n, V], theirs; V may be padded beyond the tokenizer's tokens.
            token_ids: [n] int64, theirs.
            targets: of more answer tokens than these; None where no term is taught.
        """
        # Each loss computes in full precision, and a live teacher's head in a dtype of its own.
        with torch.autocast(logits.device.type, enabled=False):
            found = {}
            if "ce" in names:
                found["ce"] = cross_entropy_loss(logits, token_ids, reduction="sum")
            taught = [name for name in names if TERMS[name].taught]
            if targets is not None and taught:
                if isinstance(targets, OverCells):
                    logits = targets.cells.of_student(logits)
                else:  # rows that pad a vocabulary beyond the tokenizer's tokens are nobody's prediction
                    logits = logits[:, : targets.vocab_size]
                some = targets.select(rows)
                found |= {name: self.losses[name](logits, some) for name in taught}
        return found

    def _vision_output(self, output: ModelOutput | None, *, with_gradient: bool) -> ModelOutput:
        """What the student's vision encoder said, from which the switched path goes on."""
        if output is None:
            raise CachekdError("the student's forward ran no vision encoder, though there are images")
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        if with_gradient and not any(tensor.requires_grad for tensor in tensors):
            raise CachekdError(
                f"there is no gradient of {labels(self.switched)}: the switched path reaches the student's "
                "vision encoder only, which is frozen",
                fix=f"train the vision encoder, or set {options_off(self.switched)}",
            )
        return output
