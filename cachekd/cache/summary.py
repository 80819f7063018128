"""What is in a cache, counted: tokens, k, entropy, and what the bytes are spent on."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from cachekd.cache.container import damaged
from cachekd.cache.layout import SHARD_FOLDER
from cachekd.cache.manifest import Manifest, ShardInfo
from cachekd.cache.plan import read_skipped
from cachekd.cache.reader import listed_shard, listed_sketch
from cachekd.cache.sealed import Part
from cachekd.cache.targets import CachedTargets, UniformTail, entropy, entropy_bounds
from cachekd.config.fields import ENTROPY_TOKENS
from cachekd.errors import CachekdError

EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 25.0)  # nats
CONTAINER = "container"
# By array; what is none of these is "other".
PARTS = {
    "ranked_ids": "ids",
    "topk_ranks": "ids",
    "topk_gaps": "logprobs",
    "k": "k",
    "beyond_knee": "k",
    "tail": "tail mass",
    "sketch_coordinates": "sketch codes",
    "sketch_shift": "sketch codes",
    "token_ids": "answer tokens",
    "sample_offsets": "keys and hashes",
    "sample_keys": "keys and hashes",
    "sample_hashes": "keys and hashes",
}


class Answers(Part):
    """What the teacher thinks of the answer tokens."""

    top1: float = Field(description="share of answer tokens that it finds the most probable")
    probability: float = Field(description="its probability of them, mean")
    logprob: float = Field(description="its logprob of them, nats, mean")
    perplexity: float = Field(description="exp(-logprob)")
    kept: float = Field(description="share of answer tokens that are among the kept entries")


class Entropy(Part):
    """The entropy of the teacher's distribution at the answer tokens, nats."""

    method: Literal["all tokens", "evenly spread tokens"] = Field(
        description="whose distributions were rebuilt in full: without a tail sketch that costs nothing"
    )
    tokens: int = Field(description="how many these are")
    mean: float = Field(description="over them")
    edges: list[float] = Field(description="[n + 1], of the bins")
    counts: list[int] = Field(description="[n], tokens in each bin")
    least: float = Field(description="mean over all tokens, if all that is not kept were one id")
    most: float = Field(description="mean over all tokens, if what is not kept were spread evenly")


class ShardSummary(Part):
    """A shard."""

    name: str
    source: int = Field(description="index in the manifest's `sources`")
    samples: int
    tokens: int
    bytes: int
    mean_k: float
    top1: float = Field(description="as in `answers`")
    logprob: float = Field(description="as in `answers`")
    kl: float | None = Field(description="to the live teacher, nats; null where it was not measured")


class CacheSummary(Part):
    """A cache, counted; `cachekd inspect --json` prints it."""

    path: str
    samples: int
    tokens: int = Field(description="answer tokens")
    entries: int = Field(description="logprobs kept")
    bytes: int = Field(description="of the shards")
    sketch_bytes: int = Field(description="of the tail sketches, once for the whole cache")
    bytes_per_token: float = Field(description="of the shards")
    bytes_by_part: dict[str, int] = Field(description="compressed bytes in the shards; together, `bytes`")
    kept_mass: float = Field(description="probability of the kept entries, mean per token")
    k: dict[int, int] = Field(description="how many tokens keep so many entries")
    knee: dict[int, int] = Field(description="the same of Kneedle's k, before any minimum")
    answers: Answers
    entropy: Entropy
    shards: list[ShardSummary]
    skipped: dict[str, int] = Field(description="how many samples were left out for each reason")
    manifest: Manifest = Field(description="as on the disk: teacher, sources, fingerprints, codec, fidelity")


def summarise(
    path: str | Path,
    *,
    entropy_tokens: int = ENTROPY_TOKENS,
    progress: Callable[[ShardInfo], None] = lambda shard: None,
) -> CacheSummary:
    """Read a whole cache, checking every shard on the way.

    What is in memory is one shard and the tail sketches, however many shards there are.

    Args:
        entropy_tokens: with a tail sketch, at how many evenly spread tokens the entropy is measured.
        progress: called with each shard that is done.

    Raises:
        CachekdError: it is not a cache, a shard is missing or damaged, or `entropy_tokens` is below 1.
    """
    if entropy_tokens < 1:
        raise CachekdError(
            "the entropy is measured at some tokens", expected="at least 1", found=entropy_tokens
        )
    path = Path(path)
    manifest = Manifest.load(path)
    counts = _Counts(spread(entropy_tokens, manifest.tokens))
    shards = []
    for number, info in enumerate(manifest.shards):
        targets = _read_targets(path, manifest, number)
        shards.append(counts.add(info, targets))
        counts.parts += bytes_by_part(path / SHARD_FOLDER / info.name)
        progress(info)
    tokens = max(1, manifest.tokens)
    return CacheSummary(
        path=str(path),
        samples=manifest.samples,
        tokens=manifest.tokens,
        entries=manifest.entries,
        bytes=manifest.size,
        sketch_bytes=manifest.sketch_bytes,
        bytes_per_token=manifest.size / tokens,
        bytes_by_part=dict(counts.parts.most_common()),
        kept_mass=counts.kept_mass / tokens,
        k=dict(sorted(counts.k.items())),
        knee=dict(sorted(counts.knee.items())),
        answers=counts.answers(),
        entropy=counts.entropy(),
        shards=shards,
        skipped=dict(Counter(one.reason for one in read_skipped(path, manifest.skipped)).most_common()),
        manifest=manifest,
    )


def _read_targets(path: Path, manifest: Manifest, number: int) -> CachedTargets:
    """Read a shard without a LogitCache, which knows all keys and keeps what it has decoded."""
    sketch = listed_sketch(path, manifest, manifest.shards[number].sketch)
    return CachedTargets.under(manifest, listed_shard(path, manifest, number).targets, sketch)


@dataclass
class _Counts:
    """Sums over the shards so far.

    Attributes:
        places: of the tokens whose entropy is measured, among all of the cache's.
    """

    places: Tensor
    tokens: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    k: Counter[int] = field(default_factory=Counter)
    knee: Counter[int] = field(default_factory=Counter)
    kept_mass: float = 0.0
    top1: int = 0
    kept: int = 0
    probability: float = 0.0
    logprob: float = 0.0
    least: float = 0.0
    most: float = 0.0
    measured: int = 0
    entropy_sum: float = 0.0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(EDGES) - 1, np.int64))

    def add(self, info: ShardInfo, targets: CachedTargets) -> ShardSummary:
        """Count one shard."""
        for name, counter in (("k", self.k), ("knee", self.knee)):
            values, found = getattr(targets, name).unique(return_counts=True)
            counter.update(dict(zip(values.tolist(), found.tolist(), strict=True)))
        top1, logprob = self._add_answers(targets)
        self.kept_mass += float(targets.logprobs.double().exp().sum())
        self._add_entropy(targets)
        self.tokens += len(targets)
        tokens = max(1, len(targets))
        return ShardSummary(
            name=info.name,
            source=info.source,
            samples=info.samples,
            tokens=len(targets),
            bytes=info.bytes,
            mean_k=float(targets.k.sum()) / tokens,
            top1=top1 / tokens,
            logprob=logprob / tokens,
            kl=None if info.fidelity is None else info.fidelity.kl,
        )

    def _add_answers(self, targets: CachedTargets) -> tuple[int, float]:
        """How often the answer is the teacher's own choice, and the sum of its logprobs."""
        answer = targets.token_ids[:, None]
        logprobs = targets.gather(answer).double()
        top1, logprob = int((targets.ids[:, :1] == answer).sum()), float(logprobs.sum())
        self.top1 += top1
        self.logprob += logprob
        self.probability += float(logprobs.exp().sum())
        self.kept += int((targets.ids == answer).sum())
        return top1, logprob

    def _add_entropy(self, targets: CachedTargets) -> None:
        least, most = entropy_bounds(targets)
        self.least += float(least.sum())
        self.most += float(most.sum())
        if isinstance(targets.tail, UniformTail):
            found = most
        else:
            inside = (self.places >= self.tokens) & (self.places < self.tokens + len(targets))
            found = entropy(targets.select(self.places[inside] - self.tokens))
        self.histogram += np.histogram(found.numpy(), bins=EDGES)[0]
        self.measured += len(found)
        self.entropy_sum += float(found.sum())

    def answers(self) -> Answers:
        """Take the means."""
        tokens = max(1, self.tokens)
        logprob = self.logprob / tokens
        return Answers(
            top1=self.top1 / tokens,
            probability=self.probability / tokens,
            logprob=logprob,
            perplexity=float(np.exp(-logprob)),
            kept=self.kept / tokens,
        )

    def entropy(self) -> Entropy:
        """Take the means, and the histogram without the empty bins at its end."""
        tokens, used = max(1, self.tokens), int(np.flatnonzero(self.histogram).max(initial=0)) + 1
        return Entropy(
            method="all tokens" if self.measured == self.tokens else "evenly spread tokens",
            tokens=self.measured,
            mean=self.entropy_sum / max(1, self.measured),
            edges=list(EDGES[: used + 1]),
            counts=self.histogram[:used].tolist(),
            least=self.least / tokens,
            most=self.most / tokens,
        )


def spread(count: int, total: int) -> Tensor:
    """[min(count, total)] int64: places in `total`, evenly spread."""
    count = min(count, total)
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * (total / max(1, count))).long()


def bytes_by_part(path: Path) -> Counter[str]:
    """The compressed bytes of a shard's arrays by what they hold; together, the file's size.

    `container` is the rest: zip directory, Zarr metadata.

    Raises:
        CachekdError: it is not a zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        size = path.stat().st_size
    except (OSError, zipfile.BadZipFile) as error:
        raise damaged(path, str(error)) from None
    found: Counter[str] = Counter()
    for member in members:
        array, _, chunk = member.filename.partition("/c/")
        if chunk:
            found[PARTS.get(array, "other")] += member.compress_size
    found[CONTAINER] = size - found.total()
    return found
