"""Make the broken shards of a cache again, and no others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cachekd.cache import Finding, Manifest, Plan
from cachekd.cache.build import SHARD_FOLDER, CacheBuild, mean_fidelity
from cachekd.cache.compare import facts, require_same
from cachekd.cache.files import commit, make_folder
from cachekd.cache.manifest import MANIFEST_FILE, Header, ShardInfo
from cachekd.cache.mend import tidy
from cachekd.cache.plan import ShardRecord
from cachekd.cache.sketch_encoder import SketchEncoder, read_encoder
from cachekd.data_options import Data, DataOptions
from cachekd.errors import CachekdError
from cachekd.fingerprint import library_versions, reads_images_otherwise
from cachekd.make_shards import make_shards
from cachekd.samples import Samples, open_samples
from cachekd.samples.dumped import as_dumped
from cachekd.samples.open import keys_hash
from cachekd.teacher import Teacher


def find_source(manifest: Manifest, findings: Sequence[Finding], data: Data) -> tuple[int, Samples]:
    """Which dump's broken shards can be made again from a data set.

    Args:
        findings: of `verify_files`.
        data: as for the dump; what is not said in it is the manifest's, limit and seed in any case.

    Returns:
        the dump's index in the manifest's sources, and the data set as that dump read it.

    Raises:
        CachekdError: none, or the dump had a map function and `data` has not.
    """
    broken = sorted({manifest.shards[f.shard].source for f in findings if f.shard is not None})
    for number in broken:
        info = manifest.sources[number].data
        named = as_dumped(DataOptions.of(data), info, f"source {number} of the cache")
        samples = open_samples(
            named.model_copy(update={"limit": info.limit, "shuffle_seed": info.shuffle_seed})
        )
        if keys_hash(samples) == info.sha256:
            return number, samples
    infos = [manifest.sources[number].data for number in broken]
    raise CachekdError(
        "the data set is not the one that the broken shards are of",
        where=DataOptions.of(data).data,
        expected=" or ".join(
            f"{info.samples:,} samples with keys sha256 {info.sha256[:16]}... ({info.path})" for info in infos
        ),
        found=f"{len(samples):,} samples with keys sha256 {keys_hash(samples)[:16]}...",
        fix="pass the data set that was dumped; a merged cache is repaired one source at a time",
    )


def refuse_what_cannot_be_made(path: Path, findings: Sequence[Finding]) -> None:
    """Before a teacher is loaded in vain.

    Raises:
        CachekdError: a broken file cannot be made again from teacher and data.
    """
    manifest = Manifest.load(path)
    for finding in findings:
        if finding.path.name in {sketch.name for sketch in manifest.sketches}:
            raise CachekdError(
                "the tail sketch cannot be made again: fitted anew it would not fit the shards",
                where=str(finding.path),
                found=finding.problem,
                fix="fetch it from where the cache came from, or dump again",
            )
        if finding.shard is None and finding.path.parent.name == SHARD_FOLDER:
            raise CachekdError(
                "the manifest does not fit a shard that is what was written",
                where=str(finding.path),
                found=finding.problem,
                fix="dump again",
            )
        if finding.shard is not None and manifest.shards[finding.shard].span is None:
            raise CachekdError(
                "the shard was cut from another, or its samples were added one by one: it cannot be made "
                "again from the data",
                where=str(finding.path),
                found=finding.problem,
                fix="fetch it from where the cache came from, or make the cache again as it was made",
            )


def repair(
    path: Path,
    findings: Sequence[Finding],
    source: int,
    teacher: Teacher,
    samples: Samples,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda samples, tokens: None,
) -> list[str]:
    """Recompute the broken shards of one dump.

    Args:
        path: a cache whose manifest is sound.
        findings: of `verify_files`.
        source, samples: of `find_source`.

    Returns:
        what was done, a line each.

    Raises:
        CachekdError: teacher or data are not the cache's, or a file cannot be made again.
    """
    refuse_what_cannot_be_made(path, findings)
    manifest = Manifest.load(path)
    header = Header(teacher=teacher.info(), fingerprints=teacher.files.fingerprints, codec=manifest.codec)
    require_same(facts(manifest), facts(header), "the cache", str(path))
    teacher = teacher.keeping(manifest.codec)
    broken = sorted({finding.shard for finding in findings if finding.shard is not None})
    done, shards = [], list(manifest.shards)
    for number in broken:
        if shards[number].source != source:
            continue
        made = _make_again(path, manifest, number, teacher, samples, workers, progress)
        if made.sha256 == shards[number].sha256:
            done.append(f"{made.name}: made again, the same bytes")
        else:
            shards[number] = made
            done.append(f"{made.name}: made again; {_why_other(manifest.sources[source].versions)}")
    if shards != manifest.shards:
        changed = manifest.model_copy(update={"shards": shards, "fidelity": mean_fidelity(shards)})
        commit(path / MANIFEST_FILE, changed.to_json())
        done += [f"{MANIFEST_FILE}: has the new checksums", *tidy(path)]
    return done


def _make_again(
    path: Path,
    manifest: Manifest,
    number: int,
    teacher: Teacher,
    samples: Samples,
    workers: int,
    progress: Callable[[int, int], None],
) -> ShardInfo:
    """A broken shard in a build of its own, then put into its place."""
    old = manifest.shards[number]
    source = manifest.sources[old.source]
    with _workshop(path) as folder:
        build = CacheBuild.start(folder, Plan.under(manifest, source))
        local = _number_of(build.plan, old, path)
        assert source.geometry is not None  # as checked
        make_shards(
            build,
            [local],
            samples,
            teacher,
            _encoder_of(path, manifest, old),
            batch_size=source.geometry.batch_size,
            workers=workers,
            on_error="skip",
            known={},
            progress=progress,
        )
        otherwise = reads_images_otherwise(manifest.fingerprints)
        made = _require_same_samples(build.record(local), old, path, otherwise)
        commit(path / SHARD_FOLDER / old.name, build.shard_path(local).read_bytes())
    return made.model_copy(update={"name": old.name, "source": old.source, "sketch": old.sketch})


def _encoder_of(path: Path, manifest: Manifest, shard: ShardInfo) -> SketchEncoder | None:
    """That the shard was coded with; None without a tail sketch."""
    if shard.sketch is None:
        return None
    info = manifest.sketches[shard.sketch]
    return read_encoder(path / info.name, info.sha256)


def _require_same_samples(
    record: ShardRecord | None, old: ShardInfo, path: Path, read_otherwise: bool
) -> ShardInfo:
    """The shard that was made, if it is of the samples of the old one.

    Args:
        read_otherwise: whether the dump may have read images in another way.

    Raises:
        CachekdError: it is not.
    """
    made = record.shard if record is not None else None
    if made is not None and (made.samples, made.samples_sha256) == (old.samples, old.samples_sha256):
        return made
    bad = record.skipped[0] if record is not None and record.skipped else None
    raise CachekdError(
        "the data set has changed since the dump" + ", or images are read in another way" * read_otherwise,
        where=f"samples {old.span} of the data set, for {path / SHARD_FOLDER / old.name}",
        expected=f"{old.samples} usable samples with content sha256 {old.samples_sha256}",
        found=f"{made.samples if made else 0} with {made.samples_sha256 if made else None}"
        + (f"; {bad.key!r}: {bad.reason}" if bad else ""),
        fix="restore the data, or dump again",
    )


def _number_of(plan: Plan, info: ShardInfo, path: Path) -> int:
    """Which shard of its dump a shard was, before caches were merged."""
    spans = plan.spans() if plan.source.geometry is not None else []
    if info.span not in spans:
        raise CachekdError(
            "the manifest does not say which samples the shard is of",
            where=str(path / SHARD_FOLDER / info.name),
            expected=f"a span of {plan.source.data.path}",
            found=info.span,
            fix="dump again",
        )
    return spans.index(info.span)


@contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """A folder inside the cache's, on the same disk, for as long as the block runs."""
    folder = path / f".repair-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _why_other(versions: dict[str, str]) -> str:
    """Why the same samples gave other bytes."""
    changed = [
        f"{name} {old} then, {new} now"
        for name, new in library_versions().items()
        if (old := versions.get(name)) != new
    ]
    return "its bytes differ: " + (", ".join(changed) or "another machine or device rounds otherwise")
