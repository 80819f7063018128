"""A smaller cache from a larger one, without a teacher: fewer logprobs a token, a coarser tail sketch.

Stored integers are cut, not decoded and rounded again. So all codes are those of a direct dump with the
smaller `top_k`, except the mass that is not kept: for the entries that are dropped, it is known from their
rounded logprobs only. Its log-odds differ from a direct dump's by at most one step of the logprobs and one
and a half of their own. (The logprobs on both sides of the odds are rounded to half a step, and the odds
before and after the cut to half of theirs each.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.codec import encode_tail
from cachekd.cache.derive import DerivedCache, new_cache
from cachekd.cache.fidelity import measure_fidelity
from cachekd.cache.manifest import CodecSettings, Fidelity, Manifest
from cachekd.cache.plan import read_skipped
from cachekd.cache.reader import LogitCache, listed_codes
from cachekd.cache.shard import decode_targets, kept_arrays, pack_codes, sketch_arrays, sketch_of
from cachekd.cache.sparse_logits import TokenTargets, among_first
from cachekd.cache.tail.coarsen import Coarsening, coarsen, sampled_tokens
from cachekd.cache.tail.encoder import read_encoder
from cachekd.cache.tail.setting import TailSetting
from cachekd.cache.targets import CachedTargets
from cachekd.config.fields import CALIBRATION_TOKENS
from cachekd.errors import CachekdError

_COMPARED = 256  # tokens whose whole rows are compared with the parent's
_SHARDS = 8  # of a sketch, whose codes show what a step costs
Arrays = dict[str, NDArray]


def cuts(manifest: Manifest) -> int:
    """How often, at most, a token of a cache lost entries: each time its odds were rounded once more."""
    codecs: dict[str | None, CodecSettings] = {
        parent: step.parent_codec for step in manifest.lineage for parent in step.parents
    }
    made: dict[str | None, int] = {}  # by the manifest's sha256; None: this one's
    for step in manifest.lineage:  # parents' steps come first
        fewer = codecs.get(step.result, manifest.codec).top_k < step.parent_codec.top_k
        made[step.result] = max(made.get(parent, 0) for parent in step.parents) + fewer
    return made.get(None, 0)


def recompress(
    path: str | Path,
    out: str | Path,
    *,
    top_k: int | None = None,
    tail: str | None = None,
    progress: Callable[[int], None] = lambda samples: None,
) -> Manifest:
    """Write a smaller cache.

    Args:
        path: the cache.
        out: the new one's folder, new or empty.
        top_k: most logprobs per token; None: as it is.
        tail: as for `cachekd dump`, but coarser than it is; None: as it is.
        progress: is told the samples that were done since the last call.

    Raises:
        CachekdError: the new cache would not be smaller, a file is damaged, or `out` holds something.
    """
    cache = LogitCache(path)
    codec = _smaller_codec(cache, top_k, tail)
    coarser = _coarsenings(cache, codec)
    with new_cache(out) as new:
        places = {number: new.add_sketch(how.encoder) for number, how in coarser.items()}
        parts: list[Fidelity] = []
        for number, info in enumerate(cache.manifest.shards):
            parts.append(_recode_shard(cache, number, codec, coarser, places, new))
            progress(info.samples)
        new.finish(
            "recompress",
            [cache.manifest],
            read_skipped(cache.path, cache.manifest.skipped),
            codec=codec,
            fidelity=Fidelity.of_all(parts),
        )
    return Manifest.load(out)


def _smaller_codec(cache: LogitCache, top_k: int | None, tail: str | None) -> CodecSettings:
    old, where = cache.manifest.codec, str(cache.path)
    top_k, tail = old.top_k if top_k is None else top_k, old.tail if tail is None else tail
    wanted = TailSetting.parse(tail)
    if top_k < 2:
        raise CachekdError("--top-k is too small", expected="at least 2", found=top_k)
    if top_k > old.top_k:
        raise CachekdError(
            "the cache holds fewer logprobs than that",
            where=where,
            expected=f"--top-k of {old.top_k} at most",
            found=top_k,
            fix="dump again: only the teacher knows the others",
        )
    if wanted.sketch and not cache.manifest.sketches:
        raise CachekdError(
            "the cache has no tail sketch",
            where=where,
            found=f"--tail {tail}",
            fix="dump again with it: a sketch is made of the teacher's hidden states",
        )
    if (top_k, tail) == (old.top_k, old.tail):
        raise CachekdError(
            "the cache has these settings already",
            where=where,
            found=f"top_k {old.top_k}, tail {old.tail}",
            fix="pass a smaller --top-k or --tail",
        )
    return old.model_copy(update={"top_k": top_k, "tail": tail})


def _coarsenings(cache: LogitCache, codec: CodecSettings) -> dict[int, Coarsening]:
    """Find a coarser sketch for each one whose codes have to change."""
    setting = TailSetting.parse(codec.tail)
    if codec.tail == cache.manifest.codec.tail or not setting.sketch:
        return {}
    used = {info.sketch for info in cache.manifest.shards}  # a part that was pulled lists them all
    return {
        number: coarsen(
            read_encoder(cache.path / info.name, info.sha256),
            _sample_of(cache, number),
            setting,
            str(cache.path / info.name),
        )
        for number, info in enumerate(cache.manifest.sketches)
        if number in used
    }


def _sample_of(cache: LogitCache, sketch: int) -> TokenTargets:
    """Read tokens of some of a sketch's shards."""
    shards = [number for number, info in enumerate(cache.manifest.shards) if info.sketch == sketch]
    chosen = [shards[place] for place in sampled_tokens(len(shards), _SHARDS)]
    parts = []
    for number in chosen:
        targets = decode_targets(
            listed_codes(cache.path, cache.manifest, number), cache.manifest.codec.logprob_step
        )
        parts.append(targets.select(sampled_tokens(len(targets), -(-CALIBRATION_TOKENS // len(chosen)))))
    return TokenTargets.concatenate(parts)


def _recode_shard(
    cache: LogitCache,
    number: int,
    codec: CodecSettings,
    coarser: dict[int, Coarsening],
    places: dict[int, int],
    new: DerivedCache,
) -> Fidelity:
    """Write a shard; how near what it has become is to what it was."""
    info = cache.manifest.shards[number]
    arrays = listed_codes(cache.path, cache.manifest, number)
    recoded, sketch = cut_entries(arrays, codec.top_k, codec.logprob_step), None
    how = None if info.sketch is None else coarser.get(info.sketch)
    if how is not None and info.sketch is not None and (codes := sketch_of(recoded)) is not None:
        recoded, sketch = recoded | sketch_arrays(how(codes)), places[info.sketch]
    elif info.sketch is not None and TailSetting.parse(codec.tail).sketch:
        sketch = new.link_sketch(cache, info.sketch)
    else:
        recoded = {name: values for name, values in recoded.items() if not name.startswith("sketch_")}
    entries = int(recoded["k"].sum(dtype=np.int64))
    new.add_recoded(cache, number, pack_codes(recoded), {"entries": entries}, sketch)
    before, after = (decode_targets(of, codec.logprob_step) for of in (arrays, recoded))
    tokens = sampled_tokens(len(before), -(-_COMPARED // len(cache.manifest.shards)))
    return measure_fidelity(
        _rebuilt(cache, before.select(tokens), number).everywhere(),
        _rebuilt(cache, after.select(tokens), number, how),
    )


def _rebuilt(
    cache: LogitCache, sparse: TokenTargets, number: int, how: Coarsening | None = None
) -> CachedTargets:
    sketch = cache.sketch(cache.manifest.shards[number].sketch) if how is None else how.encoder.sketch
    return CachedTargets.under(cache.manifest, sparse, sketch)


def cut_entries(arrays: Arrays, top_k: int, step: float) -> Arrays:
    """A shard's arrays with at most `top_k` entries a token; every code that stays is as it was, but for the
    odds of tokens that lose entries.

    Args:
        arrays: as `read_codes` gives them.
        step: of the logprobs.
    """
    k = arrays["k"]
    cut = k > top_k
    if not cut.any():
        return dict(arrays)
    targets = decode_targets(arrays, step).truncate(top_k)
    odds = encode_tail(targets.tail_logmass, targets.logprobs, targets.k)
    return {
        **arrays,
        **kept_arrays(targets),
        "tail": np.where(cut, odds, arrays["tail"]).astype("<i2"),
        "topk_gaps": arrays["topk_gaps"][among_first(k, top_k)],
    }
