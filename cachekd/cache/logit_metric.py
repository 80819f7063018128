"""What an error in a teacher's hidden state costs in its logits, and the axes along which that is told apart.

The equations are in `cachekd.cache.fit`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachekd.cache.output_head import ROWS, OutputHead
from cachekd.cache.rounding import sample_indices

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
    """Of a head, at calibration tokens [N, d] float32 on its device."""
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
