"""Ask the teacher again: does a sample of the cache hold what it says now?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import numpy as np
import torch

from cachekd.cache import CachedTargets, LogitCache, SketchTail, TailStates
from cachekd.cache.codec import TAIL_STEP
from cachekd.cache.compare import facts, require_same
from cachekd.cache.fit import SketchEncoder, read_encoder
from cachekd.cache.manifest import Header
from cachekd.errors import BadSample
from cachekd.samples import Encoded, Samples
from cachekd.teacher import Teacher

# Nats by which the same model's logits differ between machines, batches and paddings.
TOLERANCE = {"float32": 0.01, "float16": 0.1, "bfloat16": 1.0}
SHARES = (0.01, 0.02, 0.05, 0.1)


class Mismatch(NamedTuple):
    """A sample that the teacher answers otherwise."""

    key: str
    problem: str


@dataclass(frozen=True)
class Recheck:
    """What asking again has shown.

    Attributes:
        samples: how many were asked again, of `all_samples`.
        tokens: in them.
        max_error: of the kept logprobs, nats.
        bound: the codec's, and what the teacher's dtype adds.
        max_code_error: of the sketch's codes, steps; 0 without a sketch.
        code_bound: of these.
        mismatches: samples beyond a bound, or that could not be compared.
    """

    samples: int
    all_samples: int
    tokens: int
    max_error: float
    bound: float
    max_code_error: float
    code_bound: float
    mismatches: list[Mismatch]

    def detection(self, share: float) -> float:
        """With what probability at least one bad sample would have been met, if `share` of all were bad."""
        bad = round(share * self.all_samples)
        return 1 - comb(self.all_samples - bad, self.samples) / comb(self.all_samples, self.samples)


def recheck(
    cache: LogitCache,
    teacher: Teacher,
    samples: Samples,
    count: int,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Recheck:
    """Run `count` random samples of the cache through the teacher, one by one, and compare.

    Raises:
        CachekdError: the teacher, or what turns samples into its inputs, is not what the cache was made with.
    """
    manifest = cache.manifest
    header = Header(teacher=teacher.info(), fingerprints=teacher.fingerprints(), codec=manifest.codec)
    require_same(facts(manifest), facts(header), "the cache", str(cache.path))
    keys = list(cache)
    chosen = np.random.default_rng(seed).permutation(len(keys))[:count]
    places = {key: index for index, key in enumerate(samples.keys)}
    encoders = [read_encoder(cache.path / info.name, info.sha256) for info in manifest.sketches]
    tolerance = TOLERANCE.get(manifest.teacher.dtype, 1.0)
    bound = manifest.codec.logprob_step + TAIL_STEP / 2 + tolerance
    code_bound = 1 + tolerance / min((encoder.step for encoder in encoders), default=1.0)
    tokens, error, code_error, mismatches = 0, 0.0, 0.0, []
    for key in (keys[index] for index in sorted(chosen.tolist())):
        progress(1)
        if key not in places:
            mismatches.append(Mismatch(key, "is not in the data set"))
            continue
        try:
            encoded = teacher.encoder(samples[places[key]])
        except BadSample as bad:
            mismatches.append(Mismatch(key, bad.problem))
            continue
        if problem := _other_sample(cache, encoded):
            mismatches.append(Mismatch(key, problem))
            continue
        shard = manifest.shards[cache.shard_of(key)]
        encoder = None if shard.sketch is None else encoders[shard.sketch]
        off, codes_off = _errors(cache[key], teacher, encoded, encoder)
        tokens, error, code_error = tokens + len(cache[key]), max(error, off), max(code_error, codes_off)
        if off > bound:
            mismatches.append(
                Mismatch(key, f"a kept logprob is off by {off:.3f} nats, the bound is {bound:.3f}")
            )
        elif codes_off > code_bound:
            steps = f"{codes_off:.0f} steps, the bound is {code_bound:.1f}"
            mismatches.append(Mismatch(key, f"the tail sketch is off by {steps}"))
    return Recheck(len(chosen), len(keys), tokens, error, bound, code_error, code_bound, mismatches)


def _other_sample(cache: LogitCache, encoded: Encoded) -> str | None:
    if encoded.token_ids.tolist() != cache[encoded.key].token_ids.tolist():
        return "its answer tokens are others"
    if encoded.content_hash != cache.sample_hash(encoded.key):
        return "its text or images have changed"
    return None


def _errors(
    cached: CachedTargets, teacher: Teacher, encoded: Encoded, encoder: SketchEncoder | None
) -> tuple[float, float]:
    """Largest error of a kept logprob, nats; of a code of the sketch, steps."""
    hidden, logits, _, _ = teacher.forward([encoded])
    logits = logits[:, : teacher.vocab_size].float().cpu()
    kept = cached.logprobs.isfinite()
    live = logits.log_softmax(-1).gather(-1, cached.ids.clamp(max=teacher.vocab_size - 1))
    error = float((live - cached.logprobs)[kept].abs().max()) if kept.any() else 0.0
    if encoder is None or not isinstance(cached.tail, SketchTail):
        return error, 0.0
    codes = encoder.encode(TailStates(hidden, logits.logsumexp(-1).to(hidden.device)))
    off = torch.from_numpy(codes.coordinates).int() - cached.tail.coordinates.int()
    return error, float(off.abs().max()) if off.numel() else 0.0
