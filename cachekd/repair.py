"""Make the broken files of a cache again, and no others."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from cachekd.cache import Finding, Manifest, Plan
from cachekd.cache.build import RECORD_FOLDER, SHARD_FOLDER, CacheBuild, mean_fidelity, write_skipped
from cachekd.cache.compare import facts, require_same
from cachekd.cache.files import commit
from cachekd.cache.fit import read_encoder
from cachekd.cache.manifest import MANIFEST_FILE, PLAN_FILE, Header, ShardInfo, ShardRecord, Source
from cachekd.errors import CachekdError
from cachekd.make_shards import make_shards
from cachekd.samples import Samples
from cachekd.samples.open import keys_hash
from cachekd.teacher import Teacher


def restore_manifest(path: Path) -> Manifest:
    """Write a damaged manifest again from the plan and the records of the dump, if they are still there.

    Raises:
        CachekdError: they are not, or are damaged as well.
    """
    try:
        plan = Plan.read(path / PLAN_FILE)
        build = CacheBuild(path, plan)
        count = (
            len(plan.spans()) if plan.source.geometry else len(list((path / RECORD_FOLDER).glob("0*.json")))
        )
        if missing := [number for number in range(count) if build.record(number) is None]:
            raise CachekdError(
                f"{len(missing)} of {count} shards have no record", found=f"number {missing[0]} is the first"
            )
        return build.assemble(count)
    except CachekdError as error:
        raise CachekdError(
            "the manifest cannot be written again",
            where=str(path / MANIFEST_FILE),
            expected=f"the dump's plan and records in {path / RECORD_FOLDER}",
            found=error.problem,
            fix="restore it from where the cache came from, or dump again",
        ) from None


def repair(
    path: Path,
    findings: list[Finding],
    teacher: Teacher,
    samples: Samples,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda samples, tokens: None,
) -> list[str]:
    """Recompute the shards of `findings`.

    Args:
        path: a cache whose manifest is sound.
        samples: the data set of the shards' dump, opened with its limit, seed and map.

    Returns:
        what was done, a line each.

    Raises:
        CachekdError: teacher or data are not the cache's, or a file cannot be made again.
    """
    manifest = Manifest.load(path)
    header = Header(teacher=teacher.info(), fingerprints=teacher.fingerprints(), codec=manifest.codec)
    require_same(facts(manifest), facts(header), "the cache", str(path))
    teacher.codec = manifest.codec
    broken = sorted({finding.shard for finding in findings if finding.shard is not None})
    _refuse_what_cannot_be_made(path, findings, manifest)
    source = _source_of(manifest, broken, samples, path)
    done, shards = [], list(manifest.shards)
    for number, made in _make_again(path, manifest, source, broken, teacher, samples, workers, progress):
        same = made.sha256 == shards[number].sha256
        shards[number] = made
        done.append(
            f"{made.name}: made again, " + ("the same bytes" if same else "with other bytes (see below)")
        )
    if shards != manifest.shards:
        done.append("another machine or library rounds differently; the manifest has the new checksums")
        changed = manifest.model_copy(update={"shards": shards, "fidelity": mean_fidelity(shards)})
        commit(path / MANIFEST_FILE, changed.to_json())
    return done


def tidy(path: Path, findings: list[Finding]) -> list[str]:
    """Mend what needs no teacher: a manifest that was reformatted, and damaged records of a finished dump."""
    done = []
    manifest = Manifest.load(path)
    if any(finding.path.name == MANIFEST_FILE for finding in findings):
        commit(path / MANIFEST_FILE, manifest.to_json())
        done.append(f"{MANIFEST_FILE}: written again")
    skipped = any(finding.path == path / "skipped.jsonl" for finding in findings)
    if skipped:
        records = [ShardRecord.read(file) for file in sorted((path / RECORD_FOLDER).glob("[0-9]*.json"))]
        if (
            write_skipped(path, [s.model_dump() for record in records for s in record.skipped])
            != manifest.skipped
        ):
            raise CachekdError(
                "skipped.jsonl cannot be written again",
                where=str(path),
                fix="fetch it from where it came from",
            )
        done.append("skipped.jsonl: written again")
    if any(finding.path.parent.name == RECORD_FOLDER for finding in findings):
        shutil.rmtree(path / RECORD_FOLDER)  # the manifest says all that they said
        done.append(f"{RECORD_FOLDER}/: removed, a finished cache does not need it")
    return done


def _refuse_what_cannot_be_made(path: Path, findings: list[Finding], manifest: Manifest) -> None:
    for finding in findings:
        if finding.path.name in {sketch.name for sketch in manifest.sketches}:
            raise CachekdError(
                "the tail sketch cannot be made again: fitted anew it would not fit the shards",
                where=str(finding.path),
                found=finding.problem,
                fix="fetch it from where the cache came from, or dump again",
            )
        if finding.shard is None and "as well" in finding.problem:
            raise CachekdError(
                finding.problem, where=str(finding.path), fix="take it out with `cachekd select`"
            )


def _source_of(manifest: Manifest, broken: list[int], samples: Samples, path: Path) -> Source:
    """The dump that the broken shards are of."""
    digest = keys_hash(samples)
    for number in broken:
        info = manifest.shards[number]
        source = manifest.sources[info.source]
        if info.span is None or source.geometry is None:
            raise CachekdError(
                "the shard was cut from another, and cannot be made again from the data",
                where=str(path / SHARD_FOLDER / info.name),
                fix="run the `cachekd select` again that made this cache",
            )
        if source.data.sha256 != digest:
            raise CachekdError(
                "the data set is not the one that the shard is of",
                where=str(path / SHARD_FOLDER / info.name),
                expected=f"{source.data.samples:,} samples with keys sha256 {source.data.sha256[:16]} "
                f"({source.data.path})",
                found=f"{len(samples):,} samples with keys sha256 {digest[:16]}",
                fix="pass the data set of that dump; a merged cache is repaired one source at a time",
            )
    return manifest.sources[manifest.shards[broken[0]].source] if broken else manifest.sources[0]


def _make_again(
    path: Path,
    manifest: Manifest,
    source: Source,
    broken: list[int],
    teacher: Teacher,
    samples: Samples,
    workers: int,
    progress: Callable[[int, int], None],
) -> Iterable[tuple[int, ShardInfo]]:
    """Each broken shard in a build of its own, then put into its place."""
    if not broken:
        return
    assert source.geometry is not None
    header = manifest.model_dump(include=set(Header.model_fields) - {"sha256"})
    plan = Plan.model_validate({**header, "source": source})
    with tempfile.TemporaryDirectory(prefix=".repair-", dir=path) as folder:
        build = CacheBuild.start(Path(folder), plan)
        spans = build.plan.spans()
        for number in broken:
            old = manifest.shards[number]
            encoder = None
            if old.sketch is not None:
                info = manifest.sketches[old.sketch]
                encoder = read_encoder(path / info.name, info.sha256)
            local = spans.index(tuple(old.span))  # type: ignore[arg-type]  # as checked
            make_shards(
                build,
                [local],
                samples,
                teacher,
                encoder,
                batch_size=source.geometry.batch_size,
                workers=workers,
                on_error="skip",
                known={},
                progress=progress,
            )
            record = build.record(local)
            if record is None or record.shard is None or record.shard.samples != old.samples:
                found = 0 if record is None or record.shard is None else record.shard.samples
                raise CachekdError(
                    "the data set has changed since the dump",
                    where=str(path / SHARD_FOLDER / old.name),
                    expected=f"{old.samples} usable samples",
                    found=f"{found}"
                    + (
                        f"; {record.skipped[0].key!r}: {record.skipped[0].reason}"
                        if record and record.skipped
                        else ""
                    ),
                    fix="restore the data, or dump again",
                )
            commit(path / SHARD_FOLDER / old.name, build.shard_path(local).read_bytes())
            keep = {"name": old.name, "source": old.source, "sketch": old.sketch}
            yield number, record.shard.model_copy(update=keep)
