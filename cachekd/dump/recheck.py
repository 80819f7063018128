"""Ask the teacher again: are a cache's values still what it says?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cachekd.cache import CachedTargets, CodecSettings, LogitCache, SketchTail, TailStates, UniformTail
from cachekd.cache.codec import TAIL_STEP
from cachekd.cache.compare import dependencies, require_same
from cachekd.cache.manifest import Header, TeacherInfo
from cachekd.cache.recompress import cuts
from cachekd.cache.tail.encoder import SketchEncoder, read_encoder
from cachekd.cache.tail.sketch import FINE_SHIFT_STEP, SHIFT_STEP
from cachekd.cache.vocabulary import difference
from cachekd.data import Encoded, Samples
from cachekd.dump.teacher import Teacher
from cachekd.errors import BadSample, CachekdError
from cachekd.models.fingerprint import reads_images_otherwise


def value_bound(codec: CodecSettings, tolerance: float, cuts: int = 0) -> float:
    """Nats by which `value_error` may differ from 0: the codec's own bound, and the teacher's tolerance.

    Args:
        cuts: of `cachekd.cache.recompress.cuts`; each rounds the mass that is not kept again.
    """
    return codec.logprob_step + (1 + cuts) * TAIL_STEP / 2 + tolerance


def value_error(cached: CachedTargets, live: Tensor) -> float:
    """Largest error of a kept logprob, and without a sketch of the mass that is not kept; nats.

    Args:
        live: [N, V] float32, the teacher's logprobs.
    """
    kept = cached.logprobs.isfinite()
    error = (_at_kept(cached, live) - cached.logprobs)[kept].abs()
    if isinstance(cached.tail, UniformTail):
        others = (cached.vocab_size - cached.k).clamp(min=1)
        stored = cached.tail.logprob + others.log()
        found = _without_kept(cached, live).logsumexp(-1)
        error = torch.cat([error, torch.where(stored == found, 0.0, stored - found).abs()])
    return float(error.max()) if len(error) else 0.0


def order_error(cached: CachedTargets, live: Tensor) -> float:
    """Measure by how many nats an id that is not kept exceeds one that is; 0 or less if none does."""
    least = _at_kept(cached, live).masked_fill(~cached.logprobs.isfinite(), float("inf")).amin(-1)
    return float((_without_kept(cached, live).amax(-1) - least).max())


def knee_error(cached: CachedTargets, live: Tensor, codec: CodecSettings) -> float:
    """Measure by how many nats Kneedle's curve is less deep at the stored knee than at its deepest."""
    values = live.topk(min(codec.window, live.shape[-1]), dim=-1).values
    span = values[:, :1] - values[:, -1:]
    depth = span * (1 - torch.arange(values.shape[1]) / max(1, values.shape[1] - 1)) - (
        values - values[:, -1:]
    )
    at_knee = depth.gather(-1, (cached.knee[:, None] - 1).clamp(0, values.shape[1] - 1))
    missed = (depth.amax(-1, keepdim=True) - at_knee)[:, 0]
    return float(missed.masked_fill(cached.knee >= codec.top_k, 0.0).max())  # there top_k cut it short


def code_bound(encoder: SketchEncoder, tolerance: float) -> float:
    """Steps by which `code_error` may differ from 0: rounding to the other side, and the tolerance."""
    return 1 + tolerance / min(encoder.step, SHIFT_STEP)


def code_error(cached: CachedTargets, states: TailStates, encoder: SketchEncoder) -> float:
    """Largest difference of a code of the tail sketch, steps."""
    assert isinstance(cached.tail, SketchTail)
    codes = encoder.encode(states)
    coordinates = torch.from_numpy(codes.coordinates).int() - cached.tail.coordinates.int()
    shift = torch.from_numpy(codes.shift).float() - cached.tail.shift / SHIFT_STEP
    if encoder.has_shift_axis:  # from one step of the shift to the next it begins anew
        shift = shift - coordinates[:, -1] * (FINE_SHIFT_STEP / SHIFT_STEP)
        coordinates = coordinates[:, :-1]
    return max(float(off.abs().max()) for off in (coordinates, shift) if off.numel())


def _at_kept(cached: CachedTargets, live: Tensor) -> Tensor:
    return live.gather(-1, cached.ids.clamp(max=live.shape[-1] - 1))


def _without_kept(cached: CachedTargets, live: Tensor) -> Tensor:
    """The logprobs of ids that are not kept; -inf at those that are."""
    wide = torch.nn.functional.pad(live, (0, 1))  # padding has an id beyond the vocabulary
    return wide.scatter(-1, cached.ids.clamp(max=live.shape[-1]), float("-inf"))[:, :-1]


# Nats by which the same model's logits differ between machines, batches and paddings.
TOLERANCE = {"float32": 0.01, "float16": 0.1, "bfloat16": 1.0}
SHARES = (0.01, 0.02, 0.05, 0.1)


def tolerance_of(teacher: TeacherInfo) -> float:
    """Nats, by the dtypes that it computes in."""
    quantised = teacher.quantization
    dtypes = [teacher.dtype, None if quantised is None else quantised.computes_in]
    return max(TOLERANCE.get(dtype, 1.0) for dtype in dtypes if dtype is not None)


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
        vocabulary: what the cache says otherwise than the teacher's tokenizer of what a token id stands for;
            None: nothing.
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
    vocabulary: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is otherwise."""
        return not self.mismatches and self.vocabulary is None

    def detection(self, share: float) -> float:
        """Compute how probably at least one bad sample would have been met, if `share` of all were bad.

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
    require_same(dependencies(manifest), dependencies(header), "the cache", str(cache.path))
    places = {key: index for index, key in enumerate(samples.keys)}
    chosen, there = _choose(cache, places, count, seed)
    tolerance = tolerance_of(manifest.teacher)
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
        vocabulary=_wrong_vocabulary(cache, teacher),
    )


def _wrong_vocabulary(cache: LogitCache, teacher: Teacher) -> str | None:
    """Compare what the token ids stand for, where both the cache and the tokenizer say it."""
    if (said := cache.vocabulary) is None:
        return None
    try:
        found = difference(teacher.files.token_bytes, said)
    except CachekdError:
        return None
    return None if found is None else f"{found.found}, the tokenizer says: {found.expected}"


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
