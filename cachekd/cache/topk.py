"""How many logprobs a token deserves, and which: on the teacher's device, before anything is copied."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cachekd.cache.sparse_logits import TokenTargets
from cachekd.cache.tail.setting import TailSetting
from cachekd.config.fields import KEPT
from cachekd.errors import CachekdError
from cachekd.losses.chunked import at_a_time
from cachekd.losses.kneedle import kneedle_k


def select_topk(
    logits: Tensor,
    token_ids: Tensor,
    *,
    top_k: int = 128,
    top_p: float = 0.99,
    window: int = 128,
    min_k: int = 2,
) -> TokenTargets:
    """Keep each token's most probable ids: k = min(top_k, max(Kneedle's k, min_k, ids that hold top_p)).

    Logprobs are normalised over all V ids, so the mass that is not kept is known. If `top_k` is below
    Kneedle's k, `top_k` entries are kept, and the stored knee is `top_k`. The teacher-led loss then sees
    `top_k` ids.

    Args:
        logits: [N, V] float, unnormalised, on any device.
        token_ids: [N] int, the answer tokens.
        top_k: most entries per token.
        top_p: share of the mass to reach, if `top_k` allows it.
        window: Kneedle sees this many of the largest logits.
        min_k: least entries per token.

    Raises:
        CachekdError: a row has NaN, +inf, or no finite logit; shapes or settings do not fit.
    """
    if logits.ndim != 2 or token_ids.shape != logits.shape[:1]:
        raise CachekdError(
            "logits and answer tokens do not fit",
            expected="[N, V] and [N]",
            found=f"{list(logits.shape)} and {list(token_ids.shape)}",
        )
    if not (1 <= top_k <= KEPT and 0 <= top_p <= 1 and min(min_k, window) >= 1):
        raise CachekdError(
            "the settings are out of range",
            expected=f"top_k from 1 to {KEPT:,}, top_p from 0 to 1, min_k and window from 1 on",
            found=f"{top_k=}, {top_p=}, {min_k=}, {window=}",
        )
    return select_and_normalise(logits, token_ids, top_k=top_k, top_p=top_p, window=window, min_k=min_k)[0]


def select_and_normalise(
    logits: Tensor, token_ids: Tensor, *, top_k: int, top_p: float, window: int, min_k: int
) -> tuple[TokenTargets, Tensor]:
    """`select_topk`, and on the way the log-normaliser: [N] float32, logsumexp of the logits.

    One pass for the largest and one for the mass of all others: a dump pays this for every token.
    """
    width = min(max(top_k, window), logits.shape[-1])
    top, ids = logits.topk(width, dim=-1)  # [N, width], descending; NaN counts as the largest
    _check_finite(top[:, 0])
    top = top.float()
    beyond = _mass_beyond(logits, top, ids)
    normaliser = torch.logaddexp(beyond, top.logsumexp(-1))
    logprobs = top - normaliser[:, None]
    finite = logprobs.isfinite().sum(-1)
    knee = kneedle_k(logprobs[:, :window])
    # The entry that reaches top_p is the last one whose predecessors hold less than it.
    reach = ((logprobs.exp().cumsum(-1) - logprobs.exp()) < top_p).sum(-1)
    wanted = torch.maximum(torch.maximum(knee, reach), torch.full_like(knee, min_k))
    k = torch.minimum(wanted, finite).clamp(max=top_k)
    kept = torch.arange(width, device=k.device) < k[:, None]
    # Summed over what is left, not 1 - kept: the tail of a confident teacher is far below float32's epsilon.
    left = logprobs.masked_fill(kept, float("-inf")).logsumexp(-1)
    tail = torch.logaddexp(left, beyond - normaliser)
    return _to_numpy(logprobs, ids, kept, k, torch.minimum(knee, k), tail, token_ids), normaliser


def _mass_beyond(logits: Tensor, top: Tensor, ids: Tensor) -> Tensor:
    """[N] float32, logsumexp of all logits but the top ones; -inf where there is none."""
    least = top[:, -1:]  # nothing that is left is larger, so nothing overflows
    least = least.masked_fill(least.isinf(), 0.0)
    rows = max(1, at_a_time(logits.device) // logits.shape[-1])
    parts = []
    for some, without, reference in zip(logits.split(rows), ids.split(rows), least.split(rows), strict=True):
        rest = some.float() if some.dtype != torch.float32 else some.clone()
        rest = rest.scatter_(-1, without, float("-inf")).sub_(reference).exp_()
        parts.append(rest.sum(-1).log() + reference[:, 0])
    return torch.cat(parts)


def default_top_p(tail: TailSetting) -> float:
    """The share of the mass to reach: with a sketch of the rest, Kneedle's k alone decides."""
    return 0.0 if tail.sketch else 0.99


def _to_numpy(
    logprobs: Tensor, ids: Tensor, kept: Tensor, k: Tensor, knee: Tensor, tail: Tensor, token_ids: Tensor
) -> TokenTargets:
    def array(tensor: Tensor, dtype: type) -> np.ndarray:
        return tensor.cpu().numpy().astype(dtype)

    return TokenTargets(
        token_ids=array(token_ids, np.uint32),
        k=array(k, np.uint16),
        knee=array(knee, np.uint16),
        ids=array(ids[kept], np.uint32),
        logprobs=array(logprobs[kept], np.float32),
        tail_logmass=array(tail, np.float32),
    )


def _check_finite(largest: Tensor) -> None:
    broken = ~largest.isfinite()
    if broken.any():
        row = int(broken.nonzero()[0])
        raise CachekdError(
            "the teacher's logits are not finite",
            where=f"answer token {row} of the batch, {int(broken.sum())} in all",
            expected="at least one finite logit, no NaN and no +inf",
            fix="run the teacher in float32 or bfloat16: --dtype float32",
        )
