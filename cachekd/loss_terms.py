"""The three terms of one batch: L_CE, L_Align and L_VSD, each summed over answer tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cachekd.cache import CachedTargets
from cachekd.errors import CachekdError
from cachekd.losses import chunk_tokens, cross_entropy_loss, dbild_loss, summed_over_chunks
from cachekd.samples import predicting_positions
from cachekd.targets import LiveTargets
from cachekd.vlm import DeferredHead, SwitchBridge, SwitchedTeacher, capture_vision, prove_split

Targets = CachedTargets | LiveTargets


TERMS = ("ce", "align", "vsd")
_RIGHT = "right"  # beside the terms, while chunks are summed


class BatchTerms(NamedTuple):
    """Of one batch.

    Attributes:
        terms: "ce", "align" and "vsd", those that are on, each summed over answer tokens; scalars.
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
        for row, name in enumerate(TERMS):
            if name in found.terms:
                self._sums[row, 0] += found.terms[name].detach()
                self._sums[row, 1] += found.tokens if name == "ce" else found.distilled

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
        teacher: the switched path; None where L_VSD is off.
        bridge: between V_S and P_T, beyond the paper.
        align, vsd: whether L_Align and L_VSD are on at all.
        temperature: of DBiLD.
        logit_chunk: answer tokens whose logits exist at a time; by default what `chunk_tokens` says.
        autocast: of the student's forward.
        tokens, positions: a batch, and where it is answered, on which the heads are measured, before anything
            long starts.
    """

    def __init__(
        self,
        vlm: PreTrainedModel,
        teacher: SwitchedTeacher | None,
        bridge: SwitchBridge | None,
        *,
        align: bool,
        vsd: bool,
        temperature: float,
        logit_chunk: int | None,
        autocast: Callable[[], AbstractContextManager[Any]],
        tokens: dict[str, Tensor],
        positions: Tensor,
    ) -> None:
        self.vlm, self.teacher, self.bridge = vlm, teacher, bridge
        self.align, self.temperature, self.autocast = align, temperature, autocast
        self._proven = False  # that the student's parts make up the student
        if teacher is not None:
            teacher.head(tokens, positions)
            if vsd and "pixel_values" in tokens:
                self._prove(tokens, positions)
        self.head = DeferredHead(vlm, tokens, positions)
        self.logit_chunk = logit_chunk or chunk_tokens(self.head.vocab_size)

    def _prove(self, inputs: dict[str, Tensor], positions: Tensor) -> None:
        """Once, on the first sample with an image."""
        if not self._proven:
            prove_split(self.vlm, inputs, positions)
            self._proven = True

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        supervised: Tensor,
        targets: Targets | None,
        covered: Tensor | None,
        for_teacher: dict[str, Tensor] | None,
        *,
        switches: bool,
        evaluating: bool = False,
    ) -> BatchTerms:
        """See `SwitchKDTrainer.loss_terms`.

        Args:
            model: the student in its wrappers.
            switches: whether the switched path runs.
        """
        positions = predicting_positions(supervised)
        answer_ids = inputs["input_ids"][supervised]
        with capture_vision(self.vlm) as vision:
            states = self.head.states(
                lambda: model(**inputs, logits_to_keep=positions, use_cache=False).logits.flatten(0, -2)
            )
        own_path = partial(self._own_path, counts_right=evaluating)
        if targets is None or covered is None:
            terms = own_path(states, answer_ids, targets)
        else:
            terms = own_path(states[covered], answer_ids[covered], targets)
            others = own_path(states[~covered], answer_ids[~covered], None)
            terms |= {name: terms[name] + term for name, term in others.items()}
        right = terms.pop(_RIGHT, None)
        # Without an image z_W is z_T: no difference, and no gradient.
        if targets is not None and switches and "pixel_values" in inputs:
            self._prove(inputs, positions)
            output = _require_output(vision.output, with_gradient=not evaluating)
            if self.bridge is not None:
                output = self.bridge(output)
                if for_teacher is not None:  # its own number of places for an image
                    inputs = dict(for_teacher)
                    positions = predicting_positions(inputs.pop("supervised"))
            terms["vsd"] = self._switched_path(output, inputs, positions, targets, covered)
        return BatchTerms(terms, right, len(answer_ids), 0 if targets is None else len(targets))

    def _own_path(
        self, states: Tensor, answer_ids: Tensor, targets: Targets | None, *, counts_right: bool
    ) -> dict[str, Tensor]:
        """L_CE and, with targets, L_Align; and how many answer tokens are the likeliest, if that is asked."""

        def loss(some: Tensor, rows: Tensor) -> dict[str, Tensor]:
            logits = self.head.logits(some)
            terms = {"ce": cross_entropy_loss(logits, answer_ids[rows], reduction="sum")}
            if targets is not None and self.align:
                terms["align"] = self.dbild(logits, targets, rows)
            if counts_right:
                terms[_RIGHT] = (logits.argmax(-1) == answer_ids[rows]).sum()
            return terms

        # Around all chunks: the head's weights are cast once.
        with self.autocast():
            return summed_over_chunks(loss, states, self.logit_chunk)

    def _switched_path(
        self,
        vision_output: ModelOutput,
        inputs: dict[str, Tensor],
        positions: Tensor,
        targets: Targets,
        covered: Tensor | None,
    ) -> Tensor:
        """L_VSD."""
        assert self.teacher is not None  # as the trainer checked
        head = self.teacher.head(inputs, positions)
        teacher_logits = self.teacher.logits
        states = head.states(lambda: teacher_logits(vision_output, inputs, positions))

        def loss(some: Tensor, rows: Tensor) -> dict[str, Tensor]:
            return {"vsd": self.dbild(head.logits(some), targets, rows)}

        states = states if covered is None else states[covered]
        return summed_over_chunks(loss, states, self.logit_chunk)["vsd"]

    def dbild(self, logits: Tensor, targets: Targets, rows: Tensor) -> Tensor:
        """DBiLD summed over the answer tokens `rows` [n] int64, whose [n, V] logits are given."""
        if logits.shape[1] > targets.vocab_size:
            # Rows that pad a vocabulary beyond the tokenizer's tokens are nobody's prediction.
            logits = logits[:, : targets.vocab_size]
        with torch.autocast(logits.device.type, enabled=False):  # a live teacher has a dtype of its own
            return dbild_loss(
                logits,
                targets.select(rows),
                temperature=self.temperature,
                window=targets.window,
                min_k=targets.min_k,
                reduction="sum",
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
