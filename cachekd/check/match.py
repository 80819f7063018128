"""Does a cache match what is about to be trained? Stale is worse than slow."""

from __future__ import annotations

import json

import torch

from cachekd.cache import CachedTargets, LogitCache
from cachekd.cache.compare import require_same
from cachekd.cache.quantization import QuantizationInfo
from cachekd.check.missing import MissingSamples, missing_samples
from cachekd.config import DataOptions
from cachekd.data import Encoded, Samples
from cachekd.data.images import READING
from cachekd.errors import CachekdError
from cachekd.losses.terms import TERMS, options_off
from cachekd.models import ModelFiles
from cachekd.models.fingerprint import reads_images_otherwise


def check_samples(
    cache: LogitCache,
    samples: Samples,
    *,
    data: DataOptions | None,
    missing: str = "error",
    on_error: str = "stop",
    too_long: str = "error",
) -> MissingSamples:
    """Refuse a cache of another data set.

    Args:
        data: how the samples were opened; None where their keys are not the dump's (a binding).
        missing: what is done with samples that the cache lacks, as `TrainConfig` has it. A cache that has
            none of the data is refused whatever it is.
        on_error, too_long: what is done with bad ones, and with long ones, likewise.

    Returns:
        the samples that it lacks.

    Raises:
        CachekdError: what differs, and how.
    """
    lacking = missing_samples(cache, samples, data)
    if lacking and missing != "error" and len(lacking) == len(samples):
        then = "all would train by L_CE alone" if missing == "ce-only" else "nothing would be left"
        raise CachekdError(
            f"the cache lacks samples of the data set: it has none of them, and {then}",
            where=str(cache.path),
            expected=f"some of {len(samples):,} samples, as {samples.keys[0]!r}",
            found=f"{len(cache):,} others, as {next(iter(cache), None)!r}",
            fix="`cachekd bind` finds samples that have other keys in the cache; or take another cache, or "
            f"{options_off(name for name, term in TERMS.items() if term.taught)} for plain CE",
        )
    lacking.require_allowed(cache, samples, missing=missing, on_error=on_error, too_long=too_long)
    return lacking


def check_teacher(cache: LogitCache, teacher: ModelFiles) -> None:
    """Refuse a teacher whose logits are not those of the cache: the switched path would be told to be like
    another model.

    Args:
        teacher: that runs the switched path.

    Raises:
        CachekdError: weights, configuration or image processing differ; old and new.
    """
    stored = cache.manifest
    between = f"the cache (of the teacher {stored.teacher.name})", f"{cache.path} and {teacher.path}"
    require_same(
        {
            "teacher's configuration": stored.teacher.config_sha256,
            "image processing": stored.fingerprints.image_processor,
        },
        {
            "teacher's configuration": teacher.config_sha256,
            "image processing": teacher.image_processing,
        },
        *between,
    )
    # Last: all bytes of the weights may be read for it.
    weights = "teacher's weights"
    require_same({weights: stored.teacher.weights_sha256}, {weights: teacher.weights}, *between)


def check_quantization(
    cached: QuantizationInfo | None, ours: QuantizationInfo | None, where: str, *, accept: bool
) -> str | None:
    """Refuse a cache of a quantised teacher, where the teacher that runs has other weights than that: the
    switched path would be told to be like another model. A plain cache beside a quantised one is no reason.

    Args:
        cached: of the cache's teacher.
        ours: of the one that runs.
        where: the cache.
        accept: another one than the cache's is no reason to refuse.

    Returns:
        in what they differ, for the log; None where they do not.

    Raises:
        CachekdError: they differ, and the cache's is quantised.
    """
    if (cached is None and ours is None) or (cached is not None and cached.same_weights(ours)):
        return None
    names = [str(one or "not quantised") for one in (cached, ours)]
    if cached is not None and not accept:
        setting = cached.setting
        again = "" if setting is None else f"--teacher-quantization '{json.dumps(setting)}'; or "
        raise CachekdError(
            "the cache's teacher was quantised differently from the one that runs",
            where=where,
            expected=names[0],
            found=names[1],
            fix=f"{again}--teacher-mismatch accept, if this is meant",
        )
    return f"the cache's teacher was {names[0]}, the one that runs is {names[1]}"


def cut_alike(encoded: Encoded, targets: CachedTargets) -> tuple[Encoded, CachedTargets]:
    """A sample and its targets up to the last answer token that both have.

    Where samples are cut, the teacher may have read more of one than the student, or less: its images take
    other numbers of tokens, or its context is another. Whether what is left is the same: `check_sample`.
    """
    both = min(len(encoded.token_ids), len(targets))
    if len(encoded.token_ids) > both:
        encoded = encoded.up_to(both)
    return encoded, targets if len(targets) == both else targets.select(torch.arange(both))


def check_sample(cache: LogitCache, encoded: Encoded, targets: CachedTargets) -> None:
    """Refuse a sample that changed since the dump.

    Raises:
        CachekdError: its answer tokens, messages or pixels differ; the sample is named.
    """
    ours, theirs = encoded.token_ids.tolist(), targets.token_ids.tolist()
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        changed = "the data changed since the dump: run `cachekd dump` again"
        cut = (
            "if --too-long cut it in one of the two, say the same --max-tokens and --too-long in both; else "
        )
        raise CachekdError(
            "the answer tokens differ from the cache's",
            where=f"sample {encoded.key!r} of {cache.path}",
            expected=f"{len(theirs)} tokens" + ("" if at is None else f", number {at} is {theirs[at]}"),
            found=f"{len(ours)} tokens" + ("" if at is None else f", number {at} is {ours[at]}"),
            fix=changed if at is not None else cut + changed,
        )
    check_content(cache, encoded.key, encoded.content_hash)


def check_content(cache: LogitCache, key: str, found: bytes) -> None:
    """Refuse a sample whose content hash is not the one that the teacher saw.

    Raises:
        CachekdError: its messages or pixels differ.
    """
    if found != cache.sample_hash(key):
        raise CachekdError(
            "the sample's text or image differs from the one that the teacher saw",
            where=f"sample {key!r} of {cache.path}",
            expected=f"content hash {cache.sample_hash(key).hex()}",
            found=found.hex(),
            fix=f"{_why_others(cache)}: run `cachekd dump` again",
        )


def _why_others(cache: LogitCache) -> str:
    prints = cache.manifest.fingerprints
    if not reads_images_otherwise(prints):
        return "the data changed since the dump"
    theirs = prints.image_reading or "not recorded"
    return (
        "the data changed since the dump, or the cache is from before images such as the sample's were read "
        f"as they are now, transparent or 16-bit ones, say (version {READING}, the cache's is {theirs})"
    )
