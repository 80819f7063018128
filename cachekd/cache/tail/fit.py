"""Fitting the tail sketch: transform coding of the teacher's final hidden state in the metric of its logits.

With W [V, d] the output head and w_j how often id j is among a token's most probable (sum 1):

- A shift that all logits share means nothing: W is used less its w-mean, A = W - w.W.
- An error e in h costs e'Me in logits squared, averaged over the ids that matter: M = A' diag(w) A.
- In y = R' M^(1/2) (h - mean), with R the eigenvectors of M^(1/2) Cov(h) M^(1/2), the axes are uncorrelated
  and an error costs the same along each. So each is quantised with the same step (reverse water-filling).
  Codes along small axes round to zero. Axes whose loss costs hardly more than their rounding are dropped.
  This neither saves nor costs bytes, but makes the look-up faster and the basis smaller.
- logits = A mean + A M^(-1/2) R y; the cache carries that matrix, in units and steps that let its own
  rounding stay far below the codes'.

Docs: docs/explanation/what-the-cache-keeps.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachekd.cache.array_rules import MOST_CODE
from cachekd.cache.sparse_logits import TailStates, TokenTargets
from cachekd.cache.tail.encoder import (
    BASIS_FINENESS,
    ROWS,
    OutputHead,
    SketchEncoder,
    centroids,
    code_bytes,
    mass_surplus,
    sample_indices,
    to_steps,
    worth_keeping,
)
from cachekd.cache.tail.setting import Codes, TailSetting
from cachekd.cache.tail.sketch import SketchTail, TailSketch, with_shift_axis
from cachekd.errors import CachekdError

WINDOW = 128  # ids per token that count as probable


@dataclass(frozen=True)
class LogitMetric:
    """The metric M of a head, on calibration tokens.

    Attributes:
        weights: [V] float32, how often each id is among a token's most probable; their sum is 1.
        spread: nats; the standard deviation of these logits, a token's about their mean: RMS over the tokens.
        common: [d] float32, w.W, what all ids share; zeros below a cap, where a common shift is not free.
        constant: what they share of the bias, likewise.
        root, inverse_root: [d, d] float64, M^(1/2) and its pseudo-inverse.
    """

    weights: Tensor
    spread: float
    common: Tensor
    constant: float
    root: Tensor
    inverse_root: Tensor


def logit_metric(head: OutputHead, hidden: Tensor) -> LogitMetric:
    """Measure a head at calibration tokens [N, d] float32 on its device."""
    weights, spread = _id_weights(head, hidden)
    common, constant = torch.zeros_like(hidden[0]), 0.0
    if head.softcap is None:
        for rows, weight in zip(head.rows(), weights.split(ROWS), strict=True):
            common += weight @ rows
        constant = 0.0 if head.bias is None else float(weights @ head.bias.float())
    return LogitMetric(weights, spread, common, constant, *_roots(head, weights, common))


def principal_axes(hidden: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [d] float32 and the axes [d, d] float64, by descending variance of the logits along them."""
    mean = hidden.mean(0)
    spread = (hidden - mean).double() @ root
    covariance = spread.T @ spread / max(1, len(hidden))
    return mean, torch.linalg.eigh(covariance).eigenvectors.flip(1)


def along(axes: Tensor, hidden: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """y [N, C] float32, nats: where states [N, d] lie along axes [d, C]."""
    return ((hidden - mean).double() @ root @ axes).float()


def set_apart(hidden: Tensor) -> Tensor:
    """[N] bool, a quarter of the tokens: every fourth run of them, so that it has some of everything.

    All of them where there are fewer than four.
    """
    tokens = torch.arange(len(hidden), device=hidden.device)
    return (tokens // min(64, max(1, len(hidden) // 4))) % 4 == 3 if len(hidden) >= 4 else tokens >= 0


def held_out(hidden: Tensor, root: Tensor) -> Tensor:
    """y [N / 4, d]: that quarter along axes that were fitted on the others, as all tokens to come will be.

    On tokens that the axes have seen, codes are cheaper.
    """
    apart = set_apart(hidden)
    mean, axes = principal_axes(hidden[~apart] if len(hidden) >= 4 else hidden, root)
    return along(axes, hidden[apart], mean, root)


def _id_weights(head: OutputHead, hidden: Tensor) -> tuple[Tensor, float]:
    """`LogitMetric`'s weights, with half a count for ids that are never probable; and its spread."""
    counts = torch.full((len(head.weight),), 0.5, device=hidden.device)
    variances = []
    for some in hidden[sample_indices(len(hidden)).to(hidden.device)].split(256):
        top = head.logits(some).topk(min(WINDOW, len(counts)), dim=-1)
        counts += torch.bincount(top.indices.flatten(), minlength=len(counts))
        variances.append(top.values.var(-1, correction=0))
    return counts / counts.sum(), float(torch.cat(variances).mean().sqrt())


def _roots(head: OutputHead, weights: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    metric = torch.zeros(len(common), len(common), dtype=torch.float64, device=common.device)
    for rows, weight in zip(head.rows(), weights.split(ROWS), strict=True):
        centred = rows - common
        metric += ((centred * weight[:, None]).T @ centred).double()
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp(min=0).sqrt()
    keep = values > values[-1] * 1e-10
    inverse = torch.where(keep, 1 / root.clamp(min=1e-30), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


FINEST = 2**14  # steps to the farthest calibration token: other tokens may lie twice as far


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
        tail: what chooses the step.

    Raises:
        CachekdError: states that are not finite or do not fit the head.
    """
    states = TailStates(*(t.to(head.weight.device) for t in (states.hidden, states.log_normaliser)))
    hidden = states.hidden.float()
    _check(head, hidden)
    metric = logit_metric(head, hidden)
    unseen = held_out(hidden, metric.root)
    mean, axes = principal_axes(hidden, metric.root)
    y = along(axes, hidden, mean, metric.root)
    step = tail.step(Codes(unseen, unit=1.0, least=1e-4, most=1e2, spread=metric.spread))
    step = max(step, float(y.abs().max()) / FINEST)
    surplus = code_bytes(unseen, step) - code_bytes(y[set_apart(hidden)], step)
    use = worth_keeping(y, step)
    y, axes = y[:, use], axes[:, use]

    sketch = _sketch(head, metric, y, axes, step, _offset(head, metric, mean))
    analysis = ((metric.root @ axes).T / step).float()
    if tail.exact and head.softcap is None:
        sketch = with_shift_axis(sketch)
        analysis = torch.cat([analysis, torch.zeros_like(analysis[:1])])
    encoder = SketchEncoder(
        sketch=sketch,
        step=step,
        mean=mean.cpu(),
        analysis=analysis.cpu(),
        common=(metric.common.cpu(), metric.constant),
        calibration_tokens=len(hidden),
        surplus=surplus,
    )
    return _with_the_right_mass(encoder, states, targets)


def _offset(head: OutputHead, metric: LogitMetric, mean: Tensor) -> Tensor:
    """[V] float32, the logits at the mean state, less what all ids share."""
    offset = torch.cat([(rows - metric.common) @ mean for rows in head.rows()])
    return offset if head.bias is None else offset + head.bias.float() - metric.constant


def _sketch(
    head: OutputHead, metric: LogitMetric, y: Tensor, axes: Tensor, step: float, offset: Tensor
) -> TailSketch:
    """What undoes the codes of `y` [N, C] along `axes` [d, C]."""
    deviation = y.std(0, correction=0).clamp(min=step / 10)
    synthesis = ((metric.inverse_root @ axes) * deviation).float()  # [d, C]
    basis = torch.cat([(rows - metric.common) @ synthesis for rows in head.rows()])
    basis_step = max(step / BASIS_FINENESS, float(basis.abs().max()) / MOST_CODE)
    return TailSketch(
        codes=to_steps(basis, basis_step).cpu(),
        basis_step=basis_step,
        offset=offset.cpu(),
        unit=(step / deviation).cpu(),
        centroids=centroids(y / deviation, (y / step).round(), step / deviation).cpu(),
        softcap=head.softcap,
    )


def _with_the_right_mass(encoder: SketchEncoder, states: TailStates, targets: TokenTargets) -> SketchEncoder:
    """Rounding makes the rebuilt tails too heavy on average: the shift sees to it."""
    chosen = sample_indices(len(states))
    codes = encoder.encode(TailStates(states.hidden[chosen], states.log_normaliser[chosen]))
    tail = SketchTail.from_codes(encoder.sketch, codes).to(states.hidden.device)
    common, constant = encoder.common
    surplus = mass_surplus(tail, targets, chosen)
    encoder.sketch.forget_copies()  # coding needs none, and a GPU has better use for the memory
    return replace(encoder, common=(common, constant - surplus))


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
