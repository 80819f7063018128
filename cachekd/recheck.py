"""Ask the teacher again: does a sample of the cache hold what it says now?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import numpy as np

from cachekd.against_live import code_bound, code_error, knee_error, order_error, value_bound, value_error
from cachekd.cache import LogitCache, TailStates
from cachekd.cache.compare import facts, require_same
from cachekd.cache.manifest import Header
from cachekd.cache.recompress import cuts
from cachekd.cache.tail.encoder import SketchEncoder, read_encoder
from cachekd.data import Encoded, Samples
from cachekd.errors import BadSample, CachekdError
from cachekd.models.fingerprint import reads_images_otherwise
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
        all_samples: of the cache that the data set holds.
        absent: samples of the cache that the data set lacks, such as those of a merged cache's other sources.
        tokens: answer tokens that were compared.
        max_error: of the kept logprobs, nats.
        bound: the codec's, and what the teacher's dtype adds.
        max_code_error: of the sketch's codes, steps; 0 without a sketch.
        code_bound: of these.
        mismatches: samples beyond a bound, or that could not be compared.
    """

    samples: int
    all_samples: int
    absent: int
    tokens: int
    max_error: float
    bound: float
    max_code_error: float
    code_bound: float
    mismatches: list[Mismatch]

    def detection(self, share: float) -> float:
        """With what probability at least one bad sample would have been met, if `share` of all were bad.

        Of a small cache a share may be less than one sample; then it is one.
        """
        bad = max(1, round(share * self.all_samples))
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
        CachekdError: the teacher, or what turns samples into its inputs, is not what the cache was made with;
            or the data set has none of the cache's samples.
    """
    manifest = cache.manifest
    header = Header(teacher=teacher.info(), fingerprints=teacher.files.fingerprints, codec=manifest.codec)
    require_same(facts(manifest), facts(header), "the cache", str(cache.path))
    places = {key: index for index, key in enumerate(samples.keys)}
    chosen, there = _choose(cache, places, count, seed)
    tolerance = TOLERANCE.get(manifest.teacher.dtype, 1.0)
    encoders = [read_encoder(cache.path / info.name, info.sha256) for info in manifest.sketches]
    judge = _Judge(cache, teacher, encoders, tolerance)
    mismatches = []
    for key in chosen:
        progress(1)
        try:
            problem = judge(teacher.encoder(samples[places[key]]))
        except BadSample as bad:
            problem = bad.problem
        if problem is not None:
            mismatches.append(Mismatch(key, problem))
    return Recheck(
        samples=len(chosen),
        all_samples=there,
        absent=cache.manifest.samples - there,
        tokens=judge.tokens,
        max_error=judge.max_error,
        bound=judge.bound,
        max_code_error=judge.max_code_error,
        code_bound=max((code_bound(encoder, tolerance) for encoder in encoders), default=1.0),
        mismatches=mismatches,
    )


def _choose(cache: LogitCache, places: dict[str, int], count: int, seed: int) -> tuple[list[str], int]:
    """Keys to ask again, in the cache's order, and how many there are to choose from."""
    if count < 1:
        raise CachekdError("nothing would be asked again", expected="at least 1 sample", found=count)
    keys = [key for key in cache if key in places]
    if not keys:
        raise CachekdError(
            "the data set has none of the cache's samples",
            where=str(cache.path),
            expected=f"keys such as {next(iter(cache))!r}",
            found=f"keys such as {next(iter(places), None)!r}",
            fix="pass the data set that was dumped, read by the same --map and --key",
        )
    keys = list({cache.place(key): key for key in keys}.values())  # of a bound cache each sample once
    chosen = np.random.default_rng(seed).permutation(len(keys))[:count]
    return [keys[index] for index in sorted(chosen.tolist())], len(keys)


class _Judge:
    """Compares samples, and remembers the largest errors."""

    def __init__(
        self, cache: LogitCache, teacher: Teacher, encoders: Sequence[SketchEncoder], tolerance: float
    ) -> None:
        self.cache, self.teacher, self.encoders, self.tolerance = cache, teacher, encoders, tolerance
        self.bound = value_bound(cache.manifest.codec, tolerance, cuts(cache.manifest))
        self.tokens, self.max_error, self.max_code_error = 0, 0.0, 0.0

    def __call__(self, encoded: Encoded) -> str | None:
        """What is wrong with a sample; None if nothing is."""
        cached = self.cache[encoded.key]
        if encoded.token_ids.tolist() != cached.token_ids.tolist():
            return "its answer tokens are others"
        if encoded.content_hash != self.cache.sample_hash(encoded.key):
            if reads_images_otherwise(self.cache.manifest.fingerprints):
                return "its text or images have changed, or its images are read in another way since the dump"
            return "its text or images have changed"
        hidden, logits, _, _ = self.teacher.forward([encoded])
        logits = logits[:, : self.teacher.vocab_size].float()
        states = TailStates(hidden, logits.logsumexp(-1))
        live = logits.log_softmax(-1).cpu()
        if live.isnan().any():
            return "the teacher's logits are not finite"
        self.tokens += len(cached)
        error = value_error(cached, live)
        self.max_error = max(self.max_error, error)
        if error > self.bound:
            return f"a kept logprob, or their sum, is off by {error:.3f} nats, the bound is {self.bound:.3f}"
        if order_error(cached, live) > 2 * self.tolerance:
            return "an id is not kept that is more probable than one that is"
        # Its score is made of three logprobs, and compared with another such score.
        if knee_error(cached, live, self.cache.manifest.codec) > 8 * self.tolerance:
            return "Kneedle's k is another"
        shard = self.cache.manifest.shards[self.cache.shard_of(encoded.key)]
        if shard.sketch is None:
            return None
        encoder = self.encoders[shard.sketch]
        steps, bound = code_error(cached, states, encoder), code_bound(encoder, self.tolerance)
        self.max_code_error = max(self.max_code_error, steps)
        return (
            f"the tail sketch is off by {steps:.0f} steps, the bound is {bound:.1f}"
            if steps > bound
            else None
        )
