"""What is in a cache, counted: tokens, k, entropy, and what the bytes are spent on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cachekd.cache.manifest import Manifest
from cachekd.cache.sealed import Part


class Answers(Part):
    """What the teacher thinks of the answer tokens."""

    top1: float = Field(description="share of answer tokens that it finds the most probable")
    probability: float = Field(description="its probability of them, mean")
    logprob: float = Field(description="its logprob of them, nats, mean")
    perplexity: float = Field(description="exp(-logprob)")
    kept: float = Field(description="share of answer tokens that are among the kept entries")


class Entropy(Part):
    """Of the teacher's distribution at the answer tokens, nats."""

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
