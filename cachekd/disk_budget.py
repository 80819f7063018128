"""The codec that makes the most of a disk budget."""

from __future__ import annotations

from collections.abc import Callable

from cachekd.cache import CodecSettings, TailSetting
from cachekd.cache.topk import default_top_p
from cachekd.dump_estimate import Estimate
from cachekd.errors import CachekdError

SHIFT_BYTES = 1.5  # per token, about, of the sketch's shift
LEAST_SKETCH = 8  # bytes per token; below that the same bytes do more in the top-k
ALL_THAT_BYTES_BUY = "bytes=4096"  # no sketch needs as much: what bytes buy ends at BUDGET_NOISE
BUDGET_USED = 0.97  # the pilot may be off by a few percent
LEAST_TOP_K = 4  # that a disk budget may choose


def fit_budget(cost: Callable[[CodecSettings], Estimate], codec: CodecSettings, budget: int) -> Estimate:
    """The setting that makes the most of `budget` bytes for the whole cache.

    The frontier that was measured (docs/what-the-cache-keeps.md): Kneedle's k and as fine a sketch as there
    is room for; smaller k only where nothing else is left, no sketch where it would not pay for its basis.

    Args:
        cost: of a codec.
        codec: top_k and top_p give way, and so does the tail; but none stays none.

    Raises:
        CachekdError: not even the smallest setting fits.
    """
    room = int(BUDGET_USED * budget)
    found = None
    if TailSetting.parse(codec.tail).sketch:
        found = _largest_top_k(
            codec.top_k,
            lambda top_k: _finest(cost, codec.model_copy(update={"top_k": top_k, "top_p": 0.0}), room),
        )
    plain = _with_tail(codec, "none").model_copy(update={"top_p": default_top_p(TailSetting(sketch=False))})

    def without_sketch(top_k: int) -> Estimate | None:
        estimated = cost(plain.model_copy(update={"top_k": top_k}))
        return estimated if estimated.size <= room else None

    found = found or _largest_top_k(codec.top_k, without_sketch)
    if found is not None:
        return found
    least = cost(plain.model_copy(update={"top_k": LEAST_TOP_K}))
    raise CachekdError(
        "the disk budget is too small for this data set",
        where="setting 'disk_budget'",
        expected=f"at least {least.size / BUDGET_USED / 1e6:,.2f} MB (top_k {LEAST_TOP_K}, no tail sketch)",
        found=f"{budget / 1e6:,.2f} MB for {least.tokens:,} answer tokens",
        fix="raise --disk-budget, or dump fewer samples with --limit",
    )


def _largest_top_k(most: int, try_it: Callable[[int], Estimate | None]) -> Estimate | None:
    """By bisection: what fits at some top_k fits at smaller ones."""
    if best := try_it(most):
        return best
    low, high = LEAST_TOP_K, most
    best = try_it(low) if low < high else None
    while best is not None and high - low > 1:
        middle = (low + high) // 2
        if found := try_it(middle):
            best, low = found, middle
        else:
            high = middle
    return best


def _finest(cost: Callable[[CodecSettings], Estimate], codec: CodecSettings, budget: int) -> Estimate | None:
    """The finest sketch that fits; None if there is no room for LEAST_SKETCH bytes a token."""
    for most in ("exact", ALL_THAT_BYTES_BUY):
        best = cost(_with_tail(codec, most))
        if best.size <= budget:
            return best
    bare = cost(_with_tail(codec, "none"))
    room = (budget - bare.size) / max(1, bare.tokens) - SHIFT_BYTES
    for _ in range(4):  # the basis' own size depends on how fine it is
        if room < LEAST_SKETCH:
            return None
        found = cost(_with_tail(codec, f"bytes={room:.1f}"))
        if found.size <= budget:
            return found
        room -= (found.size - budget) / max(1, found.tokens) * 1.02
    return None


def _with_tail(codec: CodecSettings, tail: str) -> CodecSettings:
    return codec.model_copy(update={"tail": tail, "logprob_step": TailSetting.parse(tail).logprob_step})
