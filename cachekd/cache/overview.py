"""A cache in words: rows of names and values, for terminals, pages and cards."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from cachekd.cache.manifest import Derivation, Fidelity, Manifest
from cachekd.cache.source import Source
from cachekd.cache.summary import CacheSummary, Entropy

Rows = dict[str, str]
_K_EDGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 4096, 65535)


class Bar(NamedTuple):
    """A line of a histogram."""

    label: str
    value: int


def bytes_per_token(shards: int, sketches: int, tokens: int) -> str:
    """The figure that every page gives: what a further token costs, and what all of it costs now.

    Args:
        shards, sketches: bytes. A tail sketch's file does not grow with the tokens.
        tokens: answer tokens.
    """
    if not tokens:
        return "-"
    with_sketch = f", {(shards + sketches) / tokens:,.1f} with the tail sketch" if sketches else ""
    return f"{shards / tokens:,.1f} in the shards{with_sketch}"


def contents(manifest: Manifest) -> Rows:
    """Say how much it holds."""
    shards, skipped = len(manifest.shards), manifest.skipped
    return {
        "samples": f"{manifest.samples:,}",
        "left out": f"{skipped.samples:,} samples (skipped.jsonl)" if skipped else "no sample",
        "answer tokens": f"{manifest.tokens:,}",
        "bytes per token": bytes_per_token(manifest.size, manifest.sketch_bytes, manifest.tokens),
        "size": f"{manifest.size / 1e6:,.2f} MB in {shards:,} {'shard' if shards == 1 else 'shards'}",
        "tail sketch": f"{manifest.sketch_bytes / 1e6:,.2f} MB" if manifest.sketches else "none",
        "vocabulary": vocabulary(manifest),
        "mean k": f"{manifest.entries / max(1, manifest.tokens):.1f}",
    }


def vocabulary(manifest: Manifest) -> str:
    """Say whether it holds what the token ids stand for."""
    info = manifest.vocabulary
    return "not in it" if info is None else f"{info.tokens:,} tokens, {info.bytes / 1e6:,.2f} MB"


def headline(summary: CacheSummary) -> Rows:
    """What one wants to know first."""
    answers, entropy = summary.answers, summary.entropy
    return {
        **contents(summary.manifest),
        **_left_out(summary),
        "mass of the kept": f"{100 * summary.kept_mass:.2f} %",
        "teacher's top-1 accuracy": f"{100 * answers.top1:.2f} %",
        "its probability of the answer": f"{answers.probability:.4f} (perplexity {answers.perplexity:.3f})",
        "answers among the kept": f"{100 * answers.kept:.2f} %",
        "entropy": f"{entropy.mean:.3f} nats ({measured_at(entropy, summary.tokens)})",
        **fidelity(summary.manifest),
    }


def measured_at(entropy: Entropy, tokens: int) -> str:
    """Say at which tokens the entropy was measured; what all tokens say bounds it."""
    if entropy.tokens == tokens:
        return "all tokens"
    return f"{entropy.tokens:,} tokens; all: {entropy.least:.3f} to {entropy.most:.3f}"


def origin(manifest: Manifest) -> Rows:
    """Say which teacher, data and options made it."""
    teacher, codec = manifest.teacher, manifest.codec
    rows = {
        "teacher": f"{teacher.name} ({teacher.model_type}, {teacher.dtype}, {teacher.vocab_size:,} ids)",
        "codec": ", ".join(f"{name} {value}" for name, value in codec.model_dump().items()),
    }
    for number, sketch in enumerate(manifest.sketches):
        rows[_numbered("sketch", number, len(manifest.sketches))] = (
            f"{sketch.axes} axes, step {sketch.step:.4g} nats, fitted on "
            f"{sketch.calibration_tokens:,} tokens, {sketch.bytes / 1e6:,.2f} MB"
        )
    for number, source in enumerate(manifest.sources):
        rows[_numbered("data", number, len(manifest.sources))] = _data(source)
        rows[_numbered("made with", number, len(manifest.sources))] = ", ".join(
            f"{name} {version}" for name, version in source.versions.items()
        )
    if len(manifest.sources) > 1:
        rows["merged"] = f"of {len(manifest.sources)} dumps"
    cut = sum(
        shard.span is None and manifest.sources[shard.source].geometry is not None
        for shard in manifest.shards
    )
    if cut:
        rows["changed"] = f"{cut:,} shard(s) are not as the dump wrote them: cut, or recompressed"
    return rows | lineage(manifest)


def lineage(manifest: Manifest) -> Rows:
    """How it was made of other caches, the last step last; nothing for a dump's own."""
    steps = manifest.lineage
    return {_numbered("made by", number, len(steps)): _step(step) for number, step in enumerate(steps)}


def fingerprints(manifest: Manifest) -> Rows:
    """What must not change: sha256 of it, mostly."""
    return {
        "teacher's weights": manifest.teacher.weights_sha256,
        "teacher's configuration": manifest.teacher.config_sha256,
        **({} if (quantised := manifest.teacher.quantization) is None else {"quantisation": str(quantised)}),
        **{name.replace("_", " "): str(value) for name, value in manifest.fingerprints if value is not None},
        "manifest": manifest.sha256 or "",
    }


def k_bars(histogram: Mapping[int, int]) -> list[Bar]:
    """The histogram of k in bins that widen; empty ones at both ends left out."""
    bars = [
        Bar(
            str(high) if high - low == 1 else f"{low + 1}-{high}",
            sum(count for k, count in histogram.items() if low < k <= high),
        )
        for low, high in pairwise((-1, *_K_EDGES))
    ]
    return _without_empty_ends(bars)


def entropy_bars(entropy: Entropy) -> list[Bar]:
    """Draw the histogram of the entropy, nats."""
    labels = [f"{low:g}-{high:g}" for low, high in pairwise(entropy.edges)]
    return [Bar(*pair) for pair in zip(labels, entropy.counts, strict=True)]


def part_bars(summary: CacheSummary) -> list[Bar]:
    """The shards' bytes by what they hold."""
    return [Bar(*pair) for pair in summary.bytes_by_part.items()]


def _without_empty_ends(bars: list[Bar]) -> list[Bar]:
    full = [place for place, bar in enumerate(bars) if bar.value]
    return bars[full[0] : full[-1] + 1] if full else []


def _numbered(name: str, number: int, count: int) -> str:
    return name if count == 1 else f"{name} {number}"


def _data(source: Source) -> str:
    data = source.data
    chosen = [
        f"{name} {value}"
        for name, value in (("limit", data.limit), ("shuffle seed", data.shuffle_seed), ("map", data.map))
        if value is not None
    ]
    return ", ".join([f"{data.path} ({data.samples:,} samples)", *chosen])


def _step(step: Derivation) -> str:
    codec, shown = step.parent_codec, [parent[:12] for parent in step.parents[:3]]
    more = f" and {len(step.parents) - 3} more" if len(step.parents) > 3 else ""
    text = (
        f"{step.operation} (cachekd {step.version}) of {len(step.parents)} cache(s): {step.parent_samples:,} "
        f"samples, top_k {codec.top_k}, tail {codec.tail}, manifest {', '.join(shown)}{more}"
    )
    if (near := step.fidelity) is None:
        return text
    return f"{text}; against that {nearness(near)} ({near.tokens:,} tokens)"


def nearness(found: Fidelity) -> str:
    """How near two distributions are, and what a student learns from them."""
    return f"KL {found.kl:.4g} nats, gradient cosine {found.cosine:.4f}"


def fidelity(manifest: Manifest) -> Rows:
    """What the dump measured against the live teacher."""
    found = manifest.fidelity
    if found is None:
        return {"against the live teacher": "not measured"}
    return {
        "against the live teacher": f"{nearness(found)}, largest error of a kept logprob "
        f"{found.max_error:.3f} ({found.tokens:,} tokens, at the dump)"
    }


def _left_out(summary: CacheSummary) -> Rows:
    """Give the reasons too, if there are any."""
    reasons = [f"{count:,} x {reason}" for reason, count in summary.skipped.items()]
    more = f"; {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
    total = sum(summary.skipped.values())
    return {"left out": f"{total:,} samples: {'; '.join(reasons[:3])}{more}"} if total else {}
