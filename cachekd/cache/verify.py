"""Is every file what the manifest says, and dump/ what follows from it?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cachekd.atomic import read_plain, require_plain
from cachekd.cache.container import MOST_DECODED
from cachekd.cache.layout import DUMP_FOLDER, FINISHED_NAME, PLAN_FILE, SHARD_FOLDER, SKIPPED_FILE, shard_name
from cachekd.cache.manifest import ListedFile, Manifest, ShardInfo, SketchInfo, VocabularyInfo
from cachekd.cache.plan import DumpPlan, FinishedShard, SkippedSamples, plan_under, read_skipped
from cachekd.cache.reader import listed_shard
from cachekd.cache.sealed import MOST_JSON, is_canonical
from cachekd.cache.shard import read_keys_and_counts, samples_sha256
from cachekd.cache.tail.encoder import read_encoder
from cachekd.cache.vocabulary import read_vocabulary
from cachekd.errors import CachekdError
from cachekd.paths import MANIFEST_FILE

Progress = Callable[[int], None]


def dump_files(manifest: Manifest, skipped: SkippedSamples) -> Iterator[tuple[str, bytes]]:
    """Names in the cache's folder and contents of the plan and the records that make this manifest.

    Nothing of a cache that was made of others, and no records where the manifest is not of a whole dump.

    Args:
        skipped: what skipped.jsonl says.
    """
    if manifest.lineage or len(manifest.sources) > 1:
        return
    plan = plan_under(manifest, manifest.sources[0])
    content = plan.to_json()
    yield PLAN_FILE, content
    listed = {info.name: info for info in manifest.shards}
    sizes = [0] * len(listed)
    if isinstance(plan, DumpPlan):
        if plan.shards - len(listed) > len(skipped):  # of a shard that is not there something was left out
            return
        sizes = [last - first for first, last in plan.spans()]
    sha256, left = json.loads(content)["sha256"], iter(skipped)
    for number, size in enumerate(sizes):
        info = listed.get(shard_name(number))
        here = list(islice(left, max(0, size - info.samples if info else size)))
        note = FinishedShard(plan_sha256=sha256, shard=info, skipped=here)
        yield f"{DUMP_FOLDER}/{number:05d}.json", note.to_json()


def files_there(path: Path) -> set[Path]:
    """The plan and the records that a cache's folder has."""
    files = (path / DUMP_FOLDER).glob("*.json")
    return {file for file in files if FINISHED_NAME.fullmatch(file.stem) or file == path / PLAN_FILE}


def wrong_files(
    path: Path, manifest: Manifest, skipped: SkippedSamples
) -> Iterator[tuple[Path, str, bytes | None]]:
    """Compare dump/ with the manifest where a cache still has it: a finished one does not need it.

    Returns:
        file, what is wrong with it, and what should be in it; None where there should be no such file.
    """
    there = files_there(path)
    if not there:
        return
    for name, content in dump_files(manifest, skipped):
        there.discard(path / name)
        try:
            if read_plain(path / name, MOST_JSON) != content:
                yield path / name, "says something else than the manifest", content
        except FileNotFoundError:
            yield path / name, "is missing", content
        except OSError as error:
            yield path / name, f"cannot be read: {error.strerror}", content
    for file in sorted(there):
        yield file, "says something else than the manifest: it has no place there", None


@dataclass(frozen=True)
class Finding:
    """Something is wrong with a file.

    Attributes:
        shard: its number in the manifest, if making the shard again mends it: its bytes are others.
    """

    path: Path
    problem: str
    shard: int | None = None


def verify_files(path: str | Path, progress: Progress = lambda done: None) -> list[Finding]:
    """Compare a cache with its manifest.

    Args:
        path: the cache.
        progress: is told the bytes that were read since the last call.

    Raises:
        CachekdError: there is no manifest, or it is damaged: then nothing can be said of the rest.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    findings = []
    if not is_canonical(path / MANIFEST_FILE):
        findings.append(Finding(path / MANIFEST_FILE, "was changed after it was written"))
    try:
        skipped = read_skipped(path, manifest.skipped)
        findings += [Finding(file, problem) for file, problem, _ in wrong_files(path, manifest, skipped)]
    except CachekdError as error:
        findings.append(Finding(path / SKIPPED_FILE, f"is not what was written: {error.found}"))
    for sketch in manifest.sketches:
        findings += _of_sketch(path / sketch.name, sketch, manifest.teacher.vocab_size, progress)
    if (table := manifest.vocabulary) is not None:
        findings += _of_vocabulary(path / table.name, table, progress)
    places: dict[str, str] = {}
    for number in range(len(manifest.shards)):
        findings += _of_shard(path, manifest, number, places, progress)
    return findings


def strays(path: Path) -> list[Path]:
    """What is in a cache's folders and no part of it: harmless.

    Raises:
        CachekdError: there is no manifest, or it is damaged.
    """
    manifest = Manifest.load(path)
    known = {path / MANIFEST_FILE, path / SHARD_FOLDER, path / DUMP_FOLDER} | files_there(path)
    known |= {path / file.name for file in manifest.files}
    found = [*path.iterdir(), *(path / SHARD_FOLDER).glob("*"), *(path / DUMP_FOLDER).glob("*")]
    return sorted(set(found) - known)


def _of_sketch(file: Path, info: SketchInfo, vocab_size: int, progress: Progress) -> Iterator[Finding]:
    if problem := problem_of(file, info, progress):
        yield Finding(file, problem)
        return
    try:
        encoder = read_encoder(file, info.sha256)
    except CachekdError as error:
        yield Finding(file, f"{error.problem}: {error.found}")
        return
    found, expected = (encoder.sketch.axes, encoder.step), (info.axes, info.step)
    if found != expected:
        yield Finding(file, f"has axes and step {found}, the manifest says {expected}")
    numbers = (encoder.sketch.vocab_size, encoder.calibration_tokens)
    if numbers != (vocab_size, info.calibration_tokens):
        said = (vocab_size, info.calibration_tokens)
        yield Finding(file, f"has ids and calibration tokens {numbers}, the manifest says {said}")


def _of_vocabulary(file: Path, info: VocabularyInfo, progress: Progress) -> Iterator[Finding]:
    if problem := problem_of(file, info, progress):
        yield Finding(file, problem)
        return
    try:
        read_vocabulary(file, info)
    except CachekdError as error:
        yield Finding(file, f"{error.problem}: {error.found}")


def _of_shard(
    path: Path, manifest: Manifest, number: int, places: dict[str, str], progress: Progress
) -> Iterator[Finding]:
    """Also notes in `places` which shard each key is in."""
    info = manifest.shards[number]
    file = path / SHARD_FOLDER / info.name
    if problem := problem_of(file, info, progress):
        yield Finding(file, problem, number)
        return
    # From here on the file is what was written, so that writing it again would mend nothing.
    try:
        keys, tokens, entries = read_keys_and_counts(file)
        found, expected = (len(keys), tokens, entries), (info.samples, info.tokens, info.entries)
        if found != expected:
            yield Finding(file, f"has samples, tokens and entries {found}, the manifest says {expected}")
        else:
            shard = listed_shard(path, manifest, number, hashed=True)  # which raises what is wrong with it
            if info.samples_sha256 not in (None, samples_sha256(shard)):
                yield Finding(file, "has other keys or content hashes than the manifest says")
    except CachekdError as error:
        yield Finding(file, f"{error.problem}: {error.found}")
        return
    for key in keys:
        if key in places:
            yield Finding(file, f"holds the key {key!r}, which is in {places[key]} as well")
        places[key] = info.name


def problem_of(
    file: Path,
    info: ShardInfo | SketchInfo | VocabularyInfo | ListedFile,
    progress: Progress = lambda done: None,
) -> str | None:
    """What is wrong with a file's bytes; None if nothing is."""
    digest, size = hashlib.sha256(), 0
    try:
        if require_plain(file) > MOST_DECODED:
            return f"has more than the {MOST_DECODED:,} bytes that a file may have"
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                size += len(block)
                progress(len(block))
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if digest.hexdigest() != info.sha256:
        return f"differs from what was written: sha256 {digest.hexdigest()}, expected {info.sha256}"
    if size != info.bytes:
        return f"has {size:,} bytes, the manifest says {info.bytes:,}"
    return None
