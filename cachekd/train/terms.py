"""The terms of one batch, each summed over answer tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cachekd.cache import CachedTargets
from cachekd.data.collate import ModelInputs
from cachekd.errors import CachekdError
from cachekd.losses import chunk_tokens, summed_over_chunks
from cachekd.losses.targets import LiveTargets
from cachekd.losses.terms import TERMS
from cachekd.models import (
    DeferredHead,
    LiveTeacher,
    SwitchBridge,
    SwitchedTeacher,
    capture_vision,
    prove_split,
)
from cachekd.train.batch import Batch

Targets = CachedTargets | LiveTargets

_RIGHT = "right"  # beside the terms, while chunks are summed


class BatchTerms(NamedTuple):
    """Of one batch.

    Attributes:
        terms: by their names in `TERMS`, those that are on, each summed over answer tokens; scalars.
        right: int64 scalar, answer tokens whose argmax is right; None unless an evaluation asks.
        tokens: answer tokens.
        distilled: those of them that have the teacher's targets.
    """

    terms: dict[str, Tensor]
    right: Tensor | None
    tokens: int
    distilled: int


class TermSums:
    """What was computed since the last look, on the device: a look at each batch would wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(TERMS), 2, dtype=torch.float64, device=device)  # and of how many tokens

    def add(self, found: BatchTerms) -> None:
        """One batch more."""
        for row, (name, term) in enumerate(TERMS.items()):
            if name in found.terms:
                self._sums[row, 0] += found.terms[name].detach()
                self._sums[row, 1] += found.distilled if term.taught else found.tokens

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Each term's mean per answer token since the last look, over all processes, each of which has to
        look; without those of which nothing was computed."""
        rows = accelerator.reduce(self._sums).tolist()
        self._sums.zero_()
        return {name: total / tokens for name, (total, tokens) in zip(TERMS, rows, strict=True) if tokens}


class LossTerms:
    """Runs student and switched path, and compares both with the teacher, a few answer tokens at a time.

    Args:
        vlm: the student itself, out of DDP's and peft's wrappers: the hooks go into it.
        weights: of the terms; one whose weight is 0 is not computed.
        teacher: the switched path; None where no term is of it.
        live: takes the place of cached targets.
        bridge: between V_S and P_T, beyond the paper.
        temperature: of DBiLD.
        logit_chunk: answer tokens whose logits exist at a time; by default what `chunk_tokens` says.
        autocast: of the student's forward.
        first: a sample on which the heads are measured, before anything long starts.
    """

    def __init__(
        self,
        vlm: PreTrainedModel,
        weights: Mapping[str, float],
        *,
        teacher: SwitchedTeacher | None,
        live: LiveTeacher | None,
        bridge: SwitchBridge | None,
        temperature: float,
        logit_chunk: int | None,
        autocast: Callable[[], AbstractContextManager[Any]],
        first: ModelInputs,
    ) -> None:
        self.vlm, self.teacher, self.live, self.bridge = vlm, teacher, live, bridge
        self.temperature, self.autocast = temperature, autocast
        self.own, self.switched = (
            [name for name, term in TERMS.items() if term.path == path and weights[name] > 0]
            for path in ("own", "switched")
        )
        self._proven = False  # that the student's parts make up the student
        if teacher is not None:
            teacher.head(first.tensors, first.positions)
            if self.switched and "pixel_values" in first.tensors:
                self._prove(first)
        self.head = DeferredHead(vlm, first.tensors, first.positions)
        self.logit_chunk = logit_chunk or chunk_tokens(self.head.vocab_size)

    def _prove(self, inputs: ModelInputs) -> None:
        """Once, on the first sample with an image."""
        if not self._proven:
            prove_split(self.vlm, inputs.tensors, inputs.positions)
            self._proven = True

    def __call__(
        self, model: nn.Module, batch: Batch, *, switches: bool, evaluating: bool = False
    ) -> BatchTerms:
        """The terms that are on, each summed over answer tokens: taught ones over those with targets.

        Args:
            model: the student in its wrappers.
            switches: whether the switched path runs, if a term is of it.
            evaluating: no gradient is wanted, a live teacher is asked whatever the step is, and the answer
                tokens whose argmax is right are counted.
        """
        inputs, positions = batch.student.tensors, batch.student.positions
        token_ids, switched = batch.student.token_ids, self.switched if switches else []
        taught = evaluating or any(TERMS[name].taught for name in (*self.own, *switched))
        targets = self.targets_of(batch) if taught or self.live is None else None
        with capture_vision(self.vlm) as vision:
            states = self.head.states(
                lambda: model(**inputs, logits_to_keep=positions, use_cache=False).logits.flatten(0, -2)
            )
        if targets is None or batch.covered is None:
            terms = self._own_path(states, token_ids, targets, counts_right=evaluating)
        else:
            terms = {}
            for some, known in ((batch.covered, targets), (~batch.covered, None)):
                found = self._own_path(states[some], token_ids[some], known, counts_right=evaluating)
                terms |= {name: terms[name] + x if name in terms else x for name, x in found.items()}
        right = terms.pop(_RIGHT, None)
        # Without an image z_W is z_T: no difference, and no gradient.
        if self.teacher is not None and targets is not None and switched and "pixel_values" in inputs:
            self._prove(batch.student)
            output = _require_output(vision.output, with_gradient=not evaluating)
            terms |= self._switched_path(self.teacher, output, batch, targets)
        return BatchTerms(terms, right, len(token_ids), 0 if targets is None else len(targets))

    def targets_of(self, batch: Batch) -> Targets | None:
        """The teacher at the batch's answer tokens, or at those that the cache covers; None at none."""
        if self.live is None:
            return batch.targets
        if not batch.student.supervised.any():
            return None
        seen = batch.student if batch.teacher is None else batch.teacher
        return self.live.targets(seen.tensors, seen.positions, batch.student.token_ids)

    def _own_path(
        self, states: Tensor, token_ids: Tensor, targets: Targets | None, *, counts_right: bool
    ) -> dict[str, Tensor]:
        """L_CE and, with targets, the taught terms; and how many answer tokens are the likeliest, if that is
        asked."""
        on = [name for name in self.own if targets is not None or not TERMS[name].taught]

        def loss(some: Tensor, rows: Tensor) -> dict[str, Tensor]:
            logits = self.head.logits(some)
            terms = self._terms(on, logits, token_ids[rows], targets, rows)
            if counts_right:
                terms[_RIGHT] = (logits.argmax(-1) == token_ids[rows]).sum()
            return terms

        # Around all chunks: the head's weights are cast once.
        with self.autocast():
            return summed_over_chunks(loss, states, self.logit_chunk)

    def _switched_path(
        self, teacher: SwitchedTeacher, output: ModelOutput, batch: Batch, targets: Targets
    ) -> dict[str, Tensor]:
        """The terms of what the student's vision encoder says, `output`, in the teacher."""
        inputs = batch.student
        if self.bridge is not None:
            output = self.bridge(output)
            if batch.teacher is not None:  # its own number of places for an image
                inputs = batch.teacher
        positions = inputs.positions
        head = teacher.head(inputs.tensors, positions)
        states = head.states(lambda: teacher.logits(output, inputs.tensors, positions))
        states = states if batch.covered is None else states[batch.covered]

        def loss(some: Tensor, rows: Tensor) -> dict[str, Tensor]:
            return self._terms(self.switched, head.logits(some), targets.token_ids[rows], targets, rows)

        return summed_over_chunks(loss, states, self.logit_chunk)

    def _terms(
        self, names: list[str], logits: Tensor, token_ids: Tensor, targets: Targets | None, rows: Tensor
    ) -> dict[str, Tensor]:
        """Terms of one path, each summed over the answer tokens `rows` [n] int64.

        Args:
            logits: [n, V], theirs; V may be padded beyond the tokenizer's tokens.
            token_ids: [n] int64, theirs.
            targets: of more answer tokens than these; None where no term is taught.
        """
        # Each loss computes in full precision, and a live teacher's head in a dtype of its own.
        with torch.autocast(logits.device.type, enabled=False):
            found = {n: TERMS[n].loss(logits, token_ids) for n in names if not TERMS[n].taught}
            if targets is not None and len(found) < len(names):
                # Rows that pad a vocabulary beyond the tokenizer's tokens are nobody's prediction.
                logits, some = logits[:, : targets.vocab_size], targets.select(rows)
                how = {"window": targets.window, "min_k": targets.min_k, "temperature": self.temperature}
                found |= {n: TERMS[n].loss(logits, some, **how) for n in names if TERMS[n].taught}
        return found


def require_switch(weights: Mapping[str, float], teacher: SwitchedTeacher | None, *, compiled: bool) -> None:
    """Refuse terms of the switched path that could not be computed.

    Args:
        compiled: whether the student's forward is.

    Raises:
        CachekdError: there is no teacher to switch into, or nothing to be seen of a compiled student.
    """
    on = [term.label for name, term in TERMS.items() if term.path == "switched" and weights[name] > 0]
    if on and teacher is None:
        raise CachekdError(
            f"{on[0]} needs a teacher to switch into", fix="pass teacher=, or no weight for it"
        )
    if on and compiled:
        raise CachekdError(
            f"{on[0]} takes what the vision encoder says out of the student's forward, which a compiled one "
            "does not give",
            where="setting 'training.torch_compile'",
            fix="leave it out, or train without the switched path: --lambda-vsd 0",
        )


def _require_output(output: ModelOutput | None, *, with_gradient: bool) -> ModelOutput:
    if output is None:
        raise CachekdError("the student's forward did not run its vision encoder, though there are images")
    tensors = [value for value in output.values() if isinstance(value, Tensor)]
    if with_gradient and not any(tensor.requires_grad for tensor in tensors):
        raise CachekdError(
            "L_VSD has no gradient: it reaches the student's vision encoder only, which is frozen",
            fix="train the vision encoder, or set --lambda-vsd 0",
        )
    return output
