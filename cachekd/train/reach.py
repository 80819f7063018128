"""Does each term's gradient reach what it trains, and nothing else? Tried once, before the first step.

Some backends compute a forward and have no backward for it: the loss looks as usual, and trains nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from cachekd.config.fields import StudentPart
from cachekd.data.spread import evenly
from cachekd.errors import CachekdError
from cachekd.losses.terms import TERMS, options_off
from cachekd.models.parts import parameters_by_part
from cachekd.models.quantization import backend_of
from cachekd.train.batch import Batch, Example, batch_of
from cachekd.train.terms import LossTerms
from cachekd.train.validation import same_randomness

if TYPE_CHECKING:
    from cachekd.train.trainer import SwitchKDTrainer

log = logging.getLogger(__name__)

SAMPLES = 32  # that are read at most, to find one with whatever the terms need
BRIDGE = "switch bridge"
_NAMES = {
    "vision_encoder": "the student's vision encoder",
    "projector": "the student's projector",
    "language_model": "the student's language model",
    BRIDGE: "the switch bridge",
}


class ProveGradients(TrainerCallback):
    """Tries every term once models are wrapped and a checkpoint is loaded; see `prove_gradients`."""

    def __init__(self, trainer: SwitchKDTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before anything long."""
        prove_gradients(self.trainer)


def prove_gradients(trainer: SwitchKDTrainer) -> None:
    """Run one sample forward once, and backward once for each term that is on; then all is as before.

    A zero is no fault where the path lets gradients through all the same: a student that is its teacher is at
    the minimum of L_Align. So where a term has no gradient, another loss on the same logits is tried.

    Sharded weights (FSDP, DeepSpeed) are not tried: no process has a whole gradient.

    Raises:
        CachekdError: a term has no gradient at a part that it is to train, or one that is not finite; or it
            has one elsewhere. Term, part, and how the model computes are named.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    terms = trainer.terms
    names = terms.names
    batch = trainer._on_device(batch_of([_example(trainer)], trainer.feed.pad_token_id))
    modes = [(module, module.training) for module in terms.student.modules()]
    terms.student.train()
    try:
        with same_randomness(trainer.args.device):
            found = _forward(trainer, terms, batch)
            tried = [name for name in names if name in found]
            for name in tried:
                _Trial(trainer, batch, name).require(found[name])
    finally:
        for module, training in modes:
            module.training = training
    if untried := [TERMS[name].label for name in names if name not in tried]:
        log.warning("the gradient of %s was not tried: no sample was found for it", " and ".join(untried))


def _example(trainer: SwitchKDTrainer) -> Example:
    """A sample with whatever the terms need, a picture and the teacher's targets; else the first one."""
    terms, data = trainer.terms, trainer.train_dataset
    taught = terms.live is None and any(TERMS[name].taught for name in terms.names)
    aligns = terms.across is not None and any(TERMS[name].taught for name in terms.own)

    def serves(found: Example) -> bool:
        has_picture = not terms.switched or "pixel_values" in found.encoded.inputs
        is_aligned = not aligns or bool(found.aligned and found.aligned.rows)
        return has_picture and is_aligned and not (taught and found.targets is None)

    first = trainer.feed.first
    if serves(first):
        return first
    some = evenly(list(range(len(data))), min(SAMPLES, len(data)), 0)
    return next(filter(serves, _good(data, some)), first)


def _good(data: Any, indices: Iterable[int]) -> Iterator[Example]:
    """Those samples that can be used; what is wrong with others is said when their turn comes."""
    for index in indices:
        try:
            found = data[index]
        except CachekdError:
            continue
        if isinstance(found, Example):
            yield found


class _Probe(LossTerms):
    """The same paths with another loss, whose gradient at the logits is the same everywhere, and not zero."""

    def __init__(self, terms: LossTerms) -> None:
        vars(self).update(vars(terms))

    def _terms(self, names: list[str], logits: Tensor, *_: Any) -> dict[str, Tensor]:
        direction = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
        return dict.fromkeys(names, (logits.float() * direction).sum())


def _forward(trainer: SwitchKDTrainer, terms: LossTerms, batch: Batch) -> dict[str, Tensor]:
    """The terms' means over the batch's answer tokens; those that there are."""
    with trainer.compute_loss_context_manager():
        found = terms(terms.student, batch)
    return {name: term / max(1, found.divisors[name]) for name, term in found.terms.items()}


class _Trial:
    """One term on one batch."""

    def __init__(self, trainer: SwitchKDTrainer, batch: Batch, name: str) -> None:
        self.trainer, self.batch, self.name = trainer, batch, name
        self.terms, self.switched = trainer.terms, TERMS[name].path == "switched"
        self.parts: dict[str, list[nn.Parameter]] = {
            part: [one for one in parameters.values() if one.requires_grad]
            for part, parameters in parameters_by_part(self.terms.vlm).items()
        }
        if self.terms.bridge is not None:
            self.parts[BRIDGE] = list(self.terms.bridge.parameters())

    def require(self, term: Tensor) -> None:
        """Refuse a term whose gradient is not where it should be.

        Raises:
            CachekdError: see `prove_gradients`.
        """
        if not bool(term.isfinite()):
            return  # it would stop the first step, and be told of with all that it takes to see it again
        try:
            sizes = self._gradients(term)
            self._require_nothing_elsewhere(sizes)
            if bad := [part for part in self._expected() if not torch.tensor(sizes[part]).isfinite()]:
                raise self._refusal("a gradient that is not finite", bad[0], str(sizes[bad[0]]))
            silent = [part for part in self._expected() if not sizes[part] and not self._starts_at_zero(part)]
            if silent:
                probed = _forward(self.trainer, _Probe(self.terms), self.batch)
                sizes = self._gradients(probed[self.name])
                if dead := [part for part in silent if not sizes[part]]:
                    raise self._refusal("no gradient", dead[0], "exactly 0, whatever the loss on the logits")
        finally:
            self._clear()

    def _gradients(self, term: Tensor) -> dict[str, float]:
        """The largest |gradient| of each part, 0 where there is none; they stay at the parameters."""
        self._clear()
        if term.requires_grad:
            term.backward(retain_graph=True)  # the terms share it
        return {
            part: max((float(p.grad.abs().max()) for p in some if p.grad is not None), default=0.0)
            for part, some in self.parts.items()
        }

    def _expected(self) -> list[str]:
        """The parts that the term is to reach with this batch."""
        seen = "pixel_values" in self.batch.student.tensors
        wanted = {"vision_encoder", BRIDGE} if self.switched else {"language_model"}
        if seen and not self.switched:
            wanted |= {"vision_encoder", "projector"}
        return [part for part, some in self.parts.items() if some and part in wanted]

    def _starts_at_zero(self, part: str) -> bool:
        """Whether gradients end at a weight behind the part that is all zero, and is about to change, as a
        new projector's may be. (Under adapters it would stay zero.)"""
        behind = {"vision_encoder": ("projector", "language_model"), "projector": ("language_model",)}
        if self.switched or self.terms.student is not self.terms.vlm:
            return False
        weights = (weight for each in behind.get(part, ()) for weight in self.parts[each] if weight.ndim > 1)
        return any(not weight.any() and weight.grad is not None and weight.grad.any() for weight in weights)

    def _require_nothing_elsewhere(self, sizes: dict[str, float]) -> None:
        teacher = () if self.terms.teacher is None else self.terms.teacher.model.parameters()
        if any(parameter.requires_grad or parameter.grad is not None for parameter in teacher):
            raise self._refusal("a gradient at the teacher, which is frozen", None, "weights that train")
        beyond = ("projector", "language_model") if self.switched else (BRIDGE,)
        for part in beyond:
            if sizes.get(part):
                raise self._refusal("a gradient where it should have none,", part, f"{sizes[part]:g}")

    def _refusal(self, what: str, part: StudentPart | str | None, found: str) -> CachekdError:
        model: PreTrainedModel = self.terms.vlm
        whose = "the student"
        if self.switched and self.terms.teacher is not None:
            model, whose = self.terms.teacher.model, "the teacher"
        elsewhere = "" if self.name == "ce" else f"; or {options_off([self.name])}"
        return CachekdError(
            f"{TERMS[self.name].label} has {what}" + ("" if part is None else f" at {_NAMES[part]}"),
            where=f"{whose}, {model.config.name_or_path}: {backend_of(model)}; "
            f"sample {self.batch.keys[0]!r}, tried before the first step",
            expected="a gradient at the parts that the term trains, and nowhere else",
            found=found,
            fix=f"load {whose} with another quantisation or attention, or without one{elsewhere}",
        )

    def _clear(self) -> None:
        for some in self.parts.values():
            for parameter in some:
                parameter.grad = None
