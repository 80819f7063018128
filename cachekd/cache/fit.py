"""Fitting the tail sketch: transform coding of the teacher's final hidden state in the metric of its logits.

With W [V, d] the output head and w_j how often id j is among a token's most probable (sum 1):

- A shift that all logits share means nothing: W is used less its w-mean, A = W - w.W.
- An error e in h costs e'Me in logits squared, averaged over the ids that matter: M = A' diag(w) A.
- In y = R' M^(1/2) (h - mean), with R the eigenvectors of M^(1/2) Cov(h) M^(1/2), the axes are uncorrelated
  and an error costs the same along each. So each is quantised with the same step (reverse water-filling).
  Codes along small axes round to zero; axes whose loss costs hardly more than their rounding are dropped,
  which is even in bytes, but makes the look-up faster and the basis smaller.
- logits = A mean + A M^(-1/2) R y; the cache carries that matrix, in units and steps that let its own
  rounding stay far below the codes'.

Docs: docs/what-the-cache-keeps.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachekd.cache.arrays import Shape, damaged, pack_arrays, read_arrays
from cachekd.cache.records import SketchCodes, TailStates, TokenTargets
from cachekd.cache.sketch import (
    CENTROIDS,
    FINE_SHIFT_STEP,
    SHIFT_STEP,
    SKETCH_FORMAT,
    SketchTail,
    TailSketch,
    capped,
    read_sketch,
    with_shift_axis,
)
from cachekd.cache.tail import BUDGET_NOISE, EXACT_NOISE, LEAST_NOISE, TailSetting
from cachekd.errors import CachekdError

WINDOW = 128  # ids per token that count as probable
ROWS = 8192  # of W at a time
SAMPLED = 1024  # calibration tokens whose whole logits are looked at
LEAST_POWER = 0.2  # an axis is kept if its mean square is this many steps squared
BASIS_FINENESS = 8  # the basis' rounding adds 1 / FINENESS**2 to the codes' noise
INT16 = 2**15 - 1
FINEST = 2**14  # steps to the farthest calibration token: other tokens may lie twice as far
CODER_OVERHEAD = 1.03  # PCodec over the order-0 entropy


@dataclass(frozen=True)
class OutputHead:
    """How a teacher's logits follow from its final hidden state: cap(weight . h + bias).

    Attributes:
        weight: [V, d] float, scaled by whatever the model scales its logits by; no padding rows.
        bias: [V] float, or None.
        softcap: see `TailSketch`.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 from [N, d]."""
        logits = hidden.to(self.weight) @ self.weight.T
        return capped((logits if self.bias is None else logits + self.bias).float(), self.softcap)


@dataclass(frozen=True)
class SketchEncoder:
    """Turns hidden states into codes.

    Attributes:
        sketch: what undoes it.
        step: nats.
        mean: [d] float32, of the calibration tokens.
        analysis: [C, d] float32, code steps per hidden unit; a last row of zeros is the shift's axis.
        common: [d] float32 and a number: the part of the logits that is the same for every id.
        calibration_tokens: that it was fitted on.
        surplus: bytes per token by which codes of tokens that the axes were not fitted on cost more.
    """

    sketch: TailSketch
    step: float
    mean: Tensor
    analysis: Tensor
    common: tuple[Tensor, float]
    calibration_tokens: int
    surplus: float

    @property
    def has_shift_axis(self) -> bool:
        """Whether the last axis takes what the shift's rounding leaves (`cachekd.cache.sketch`)."""
        return not self.analysis[-1].any()

    def encode(self, states: TailStates) -> SketchCodes:
        """Codes of N tokens; on the device of `states`, returned on the CPU."""
        device = states.hidden.device
        hidden = states.hidden.float()
        coordinates = (hidden - self.mean.to(device)) @ self.analysis.to(device).T
        direction, constant = self.common
        shift = (states.log_normaliser.float() - hidden @ direction.to(device) - constant) / SHIFT_STEP
        if self.has_shift_axis:
            coordinates[:, -1] = (shift.round() - shift) * (SHIFT_STEP / FINE_SHIFT_STEP)
        return SketchCodes(_to_int16(coordinates), _to_int16(shift))

    def pack(self) -> bytes:
        """The bytes of a cache's sketch file: what undoes the codes, and what makes more of them."""
        direction, constant = self.common
        arrays = {
            "analysis": self.analysis.cpu().numpy().astype("<f4"),
            "mean": self.mean.cpu().numpy().astype("<f4"),
            "common": direction.cpu().numpy().astype("<f4"),
            "numbers": np.array([self.step, constant, self.calibration_tokens, self.surplus], "<f8"),
        }
        return pack_arrays({**self.sketch.arrays(), **arrays}, SKETCH_FORMAT)


def read_encoder(path: Path, sha256: str | None = None) -> SketchEncoder:
    """From a cache's sketch file.

    Raises:
        CachekdError: it is missing, damaged, or for reading only.
    """
    shapes: dict[str, Shape] = {"analysis": (None, None), "mean": (None,), "common": (None,), "numbers": (4,)}
    arrays = read_arrays(path, list(shapes), SKETCH_FORMAT, sha256, shapes)
    if not all(np.isfinite(values).all() for values in arrays.values()):
        raise damaged(path, "what codes more tokens is not finite")
    tensors = {name: torch.from_numpy(arrays[name].copy()) for name in ("analysis", "mean", "common")}
    step, constant, tokens, surplus = arrays["numbers"].tolist()
    return SketchEncoder(
        sketch=read_sketch(path, sha256),
        step=step,
        mean=tensors["mean"],
        analysis=tensors["analysis"],
        common=(tensors["common"], constant),
        calibration_tokens=int(tokens),
        surplus=surplus,
    )


@torch.no_grad()
def fit_sketch(
    head: OutputHead, states: TailStates, targets: TokenTargets, tail: TailSetting
) -> SketchEncoder:
    """Fit the sketch on calibration tokens.

    Few tokens, fewer than dimensions, or constant states are no error: the axes that they span are kept.

    Args:
        head: the teacher's.
        states: at the calibration tokens, on any device.
        targets: what is kept of the same tokens besides.
        tail: the step, or the budget from which it is found.

    Raises:
        CachekdError: states that are not finite or do not fit the head.
    """
    states = TailStates(*(t.to(head.weight.device) for t in (states.hidden, states.log_normaliser)))
    hidden = states.hidden.float()
    _check(head, hidden)
    weights, spread = _id_weights(head, hidden)
    # Below a cap a common shift is not free.
    common = torch.zeros_like(hidden[0])
    if head.softcap is None:
        for rows, weight in zip(_rows(head), weights.split(ROWS), strict=True):
            common += weight @ rows
    root, inverse_root = _metric_roots(head, weights, common)

    step = tail.step
    if step is None:  # the noise of all axes together is given
        noise = min(BUDGET_NOISE, max(LEAST_NOISE, EXACT_NOISE * spread)) if tail.exact else BUDGET_NOISE
        step = noise * (12 / hidden.shape[1]) ** 0.5
        if tail.bytes is not None:
            step = max(step, _step_for(tail.bytes, hidden, root))

    mean, axes = _axes(hidden, root)
    y = ((hidden - mean).double() @ root @ axes).float()
    step = max(step, float(y.abs().max()) / FINEST)
    surplus = code_bytes(_held_out(hidden, root), step) - code_bytes(y[_apart(hidden)], step)
    codes = (y / step).round()
    use = worth_keeping(y, step)
    y, codes, axes = y[:, use], codes[:, use], axes[:, use]

    deviation = y.std(0, correction=0).clamp(min=step / 10)
    synthesis = ((inverse_root @ axes) * deviation).float()  # [d, C]
    basis = torch.cat([(rows - common) @ synthesis for rows in _rows(head)])
    basis_step = max(step / BASIS_FINENESS, float(basis.abs().max()) / INT16)
    constant = 0.0
    offset = torch.cat([(rows - common) @ mean for rows in _rows(head)])
    if head.bias is not None:
        constant = float(weights @ head.bias.float()) if head.softcap is None else 0.0
        offset = offset + head.bias.float() - constant
    sketch = TailSketch(
        codes=_to_steps(basis, basis_step).cpu(),
        basis_step=basis_step,
        offset=offset.cpu(),
        unit=(step / deviation).cpu(),
        centroids=centroids(y / deviation, codes, step / deviation).cpu(),
        softcap=head.softcap,
    )
    analysis = ((root @ axes).T / step).float()
    if tail.exact and head.softcap is None:
        sketch = with_shift_axis(sketch)
        analysis = torch.cat([analysis, torch.zeros_like(analysis[:1])])
    encoder = SketchEncoder(
        sketch=sketch,
        step=step,
        mean=mean.cpu(),
        analysis=analysis.cpu(),
        common=(common.cpu(), constant),
        calibration_tokens=len(hidden),
        surplus=surplus,
    )
    surplus = _mass_surplus(encoder, states, targets)
    encoder.sketch.forget_copies()  # coding needs none, and a GPU has better use for the memory
    return replace(encoder, common=(common.cpu(), constant - surplus))


def _id_weights(head: OutputHead, hidden: Tensor) -> tuple[Tensor, float]:
    """[V], how often each id is among the WINDOW most probable; half a count for those that never are.

    And the standard deviation of these logits, a token's about their mean: nats, RMS over the tokens.
    """
    counts = torch.full((len(head.weight),), 0.5, device=hidden.device)
    variances = []
    for some in _sampled(hidden).split(256):
        top = head.logits(some).topk(min(WINDOW, len(counts)), dim=-1)
        counts += torch.bincount(top.indices.flatten(), minlength=len(counts))
        variances.append(top.values.var(-1, correction=0))
    return counts / counts.sum(), float(torch.cat(variances).mean().sqrt())


def _metric_roots(head: OutputHead, weights: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    """M^(1/2) and its pseudo-inverse, [d, d] float64."""
    metric = torch.zeros(len(common), len(common), dtype=torch.float64, device=common.device)
    for rows, weight in zip(_rows(head), weights.split(ROWS), strict=True):
        centred = rows - common
        metric += ((centred * weight[:, None]).T @ centred).double()
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp(min=0).sqrt()
    keep = values > values[-1] * 1e-10
    inverse = torch.where(keep, 1 / root.clamp(min=1e-30), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def _axes(hidden: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [d] float32 and the axes [d, d] float64, by descending variance of the logits along them."""
    mean = hidden.mean(0)
    spread = (hidden - mean).double() @ root
    covariance = spread.T @ spread / max(1, len(hidden))
    return mean, torch.linalg.eigh(covariance).eigenvectors.flip(1)


def worth_keeping(y: Tensor, step: float) -> Tensor:
    """[d] bool: the axes of `y` [N, d] whose loss would cost more than rounding does; at least one.

    By their power, not by how often they are in use: what is rare and large must not be lost.
    """
    power = y.square().mean(0)
    use = power >= LEAST_POWER * step**2
    use[power.argmax()] = True
    return use


def _apart(hidden: Tensor) -> Tensor:
    """[N] bool, a quarter of the tokens: every fourth run of them, so that it has some of everything."""
    tokens = torch.arange(len(hidden), device=hidden.device)
    return (tokens // min(64, max(1, len(hidden) // 4))) % 4 == 3 if len(hidden) >= 4 else tokens >= 0


def _held_out(hidden: Tensor, root: Tensor) -> Tensor:
    """[N / 4, d]: that quarter along axes that were fitted on the others, as all tokens to come will be.

    On tokens that the axes have seen, codes are cheaper.
    """
    apart = _apart(hidden)
    mean, axes = _axes(hidden[~apart] if len(hidden) >= 4 else hidden, root)
    return ((hidden[apart] - mean).double() @ root @ axes).float()


def _step_for(budget: float, hidden: Tensor, root: Tensor) -> float:
    """The step at which codes cost `budget` bytes per token."""
    y = _held_out(hidden, root)
    low, high = 1e-4, 1e2
    for _ in range(40):
        step = (low * high) ** 0.5
        low, high = (step, high) if code_bytes(y, step) > budget else (low, step)
    return high


def code_bytes(y: Tensor, step: float) -> float:
    """Order-0 entropy of the codes of `y` [N, d], axis by axis; bytes per token with the coder's overhead."""
    kept = y[:, worth_keeping(y, step)].cpu().numpy()
    codes = np.clip(np.rint(kept / step), -(2**15), 2**15 - 1).astype(np.int64)
    low, width = codes.min(), int(codes.max() - codes.min()) + 1
    bits = 0.0
    for column in codes.T:
        counts = np.bincount(column - low, minlength=width)
        share = counts[counts > 0] / len(codes)
        bits -= float((share * np.log2(share)).sum())
    return bits / 8 * CODER_OVERHEAD


def centroids(y: Tensor, codes: Tensor, unit: Tensor) -> Tensor:
    """[CENTROIDS, C], the mean of what was coded as 1, 2; the middle where too few were."""
    rows = []
    for magnitude in range(1, CENTROIDS + 1):
        chosen = codes.abs() == magnitude
        mean = (y.abs() * chosen).sum(0) / chosen.sum(0).clamp(min=1)
        rows.append(torch.where(chosen.sum(0) >= 16, mean, magnitude * unit))
    return torch.stack(rows)


def _mass_surplus(encoder: SketchEncoder, states: TailStates, targets: TokenTargets) -> float:
    """`mass_surplus` of calibration tokens."""
    chosen = sample_indices(len(states))
    codes = encoder.encode(TailStates(states.hidden[chosen], states.log_normaliser[chosen]))
    tail = SketchTail.from_codes(encoder.sketch, codes).to(states.hidden.device)
    return mass_surplus(tail, [targets.cut(token, token + 1) for token in chosen.tolist()])


def mass_surplus(tail: SketchTail, targets: Sequence[TokenTargets]) -> float:
    """By how many nats the rebuilt tails are too heavy, on average.

    Rounding moves every logit, and the exponential of that is not right on average.

    Args:
        tail: of some tokens.
        targets: what is kept of each.
    """
    surplus = []
    for places in torch.arange(len(targets)).split(64):
        logprobs = tail.select(places.to(tail.shift.device)).everywhere(tail.sketch.vocab_size)
        for row, token in zip(logprobs, places.tolist(), strict=True):
            kept = targets[token]
            if kept.tail_logmass[0] > -12:  # something is left that matters
                row[torch.from_numpy(kept.ids.astype(np.int64)).to(row.device)] = float("-inf")
                surplus.append(float(row.logsumexp(-1)) - float(kept.tail_logmass[0]))
    return float(np.mean(surplus)) if surplus else 0.0


def sample_indices(count: int) -> Tensor:
    """Up to SAMPLED tokens, evenly spread."""
    return torch.linspace(0, count - 1, min(SAMPLED, count)).long()


def _sampled(hidden: Tensor) -> Tensor:
    return hidden[sample_indices(len(hidden)).to(hidden.device)]


def _rows(head: OutputHead) -> Iterator[Tensor]:
    return (rows.float() for rows in head.weight.split(ROWS))


def _to_steps(values: Tensor, step: float) -> Tensor:
    return (values / step).round().clamp(-INT16, INT16).to(torch.int16)


def _to_int16(values: Tensor) -> np.ndarray:
    return _to_steps(values, 1.0).cpu().numpy()


def _check(head: OutputHead, hidden: Tensor) -> None:
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1] or not len(hidden):
        raise CachekdError(
            "the hidden states do not fit the output head",
            expected=f"[N, {head.weight.shape[1]}], N at least 1",
            found=list(hidden.shape),
        )
    if head.bias is not None and not head.bias.isfinite().all():
        raise CachekdError(
            "the output head's bias is not finite",
            found=f"{int((~head.bias.isfinite()).sum())} of {len(head.bias)} ids",
            fix="use --tail none",
        )
    if not hidden.isfinite().all():
        raise CachekdError(
            "the teacher's hidden states are not finite",
            found=f"{int((~hidden.isfinite().all(-1)).sum())} of {len(hidden)} tokens",
            fix="run the teacher in float32 or bfloat16: --dtype float32",
        )
