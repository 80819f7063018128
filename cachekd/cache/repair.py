"""Delete what is broken, so that the same dump makes it again, byte for byte; nothing else is lost by it.

A broken shard loses its record and its file, a broken vocabulary its file, and then the manifest goes: what
is left is a dump that is not finished. At whatever moment this is killed, both the same dump and another
repair go on from there. What follows from sound files (manifest, skipped.jsonl, plan, records) is not deleted
but written again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cachekd.atomic import commit, sync_folder
from cachekd.cache.build import CacheBuild
from cachekd.cache.layout import (
    DUMP_FOLDER,
    PLAN_FILE,
    SHARD_FOLDER,
    SKETCH_FILE,
    SKIPPED_FILE,
    VOCABULARY_FILE,
)
from cachekd.cache.manifest import Header, Manifest, ShardInfo
from cachekd.cache.plan import (
    DumpPlan,
    Skipped,
    plan_under,
    read_plan,
    read_skipped,
    skipped_info,
    write_skipped,
)
from cachekd.cache.sealed import is_canonical
from cachekd.cache.tail.encoder import read_encoder
from cachekd.cache.verify import Finding, files_there, problem_of, wrong_files
from cachekd.errors import CachekdError
from cachekd.lock import alone
from cachekd.paths import MANIFEST_FILE

Require = Callable[[DumpPlan], None]


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        done: a line for each file that was deleted or written.
        plan: of the dump that has to go on now; None where the cache is whole again.
        skips: whether that dump left bad samples out.
    """

    done: list[str]
    plan: DumpPlan | None = None
    skips: bool = False


def repair(path: Path, findings: Sequence[Finding], require: Require) -> Repaired:
    """Delete or write again what `verify_files` has found.

    Args:
        findings: of `verify_files`; not needed where the manifest cannot be read.
        require: raises a CachekdError where the dump would not go on with a plan.

    Raises:
        CachekdError: another process works in the folder, or something can neither be written again nor be
            made again by the dump: what, and what to do instead. Then nothing was deleted.
    """
    with alone(path, "writes into"):
        try:
            manifest = Manifest.load(path)
        except CachekdError as error:
            return _by_notes(path, error, require)
        return _by_manifest(path, manifest, findings, require)


def _by_manifest(path: Path, manifest: Manifest, findings: Sequence[Finding], require: Require) -> Repaired:
    _refuse_what_stays_broken(path, manifest, findings)
    # Looked at once more: somebody may have put a file back meanwhile.
    shards = [manifest.shards[f.shard] for f in findings if f.shard is not None]
    broken = _broken(path, shards) | _broken_vocabulary(path, manifest)
    plan = _require_dump(path, manifest, *next(iter(broken.items())), require) if broken else None
    done = []
    if not is_canonical(path / MANIFEST_FILE):
        commit(path / MANIFEST_FILE, manifest.to_json())
        done.append(f"{MANIFEST_FILE}: written again")
    try:
        skipped = read_skipped(path, manifest.skipped)
    except CachekdError as error:
        _restore_skipped(path, manifest, error)
        skipped = read_skipped(path, manifest.skipped)
        done.append(f"{SKIPPED_FILE}: written again from the dump's records")
    for file, problem, content in wrong_files(path, manifest, skipped):
        if content is None:
            what, fix = "a file of dump/ is not of this cache", f"remove {file.parent}: it is not needed"
            raise CachekdError(what, where=str(file), found=problem, fix=fix)
        commit(file, content)
        done.append(f"{DUMP_FOLDER}/{file.name}: written again from the manifest")
    if plan is None:
        return Repaired(done)
    return Repaired(done + _remove(CacheBuild(path, plan), broken), plan, manifest.skipped is not None)


def _by_notes(path: Path, error: CachekdError, require: Require) -> Repaired:
    """The manifest cannot be read: the dump's records say the same, where they are."""
    try:
        plan = read_plan(path / PLAN_FILE)
    except CachekdError as other:
        raise _no_manifest(path, f"{error.found}; {other.problem}") from None
    build = CacheBuild(path, plan)
    notes = {number: build.noted(number) for number in build.noted_numbers()}
    broken = _broken(path, [note.shard for note in notes.values() if note and note.shard])
    # Where samples were added one by one, a record may be lost, but hardly with its shard.
    files = (path / SHARD_FOLDER).glob("[0-9]*.zarr.zip")
    count = plan.shards if isinstance(plan, DumpPlan) else len(list(files))
    sound = sum(note is not None for number, note in notes.items() if number < count) - len(broken)
    broken |= _broken_vocabulary(path, plan)
    if sound == count and not broken:
        build.assemble(count)
        return Repaired([f"{MANIFEST_FILE}: written again from the dump's records"])
    if not isinstance(plan, DumpPlan):
        others = [f"{name} {problem}" for name, problem in _broken_vocabulary(path, plan).items()]
        found = f"{sound:,} of {count:,} shards have a sound record and file"
        raise _no_manifest(path, "; ".join([found, *others]))
    require(plan)
    if plan.codec.tail != "none":
        read_encoder(path / SKETCH_FILE)
    skips = any(note.skipped for note in notes.values() if note)
    return Repaired(_remove(build, broken), plan, skips)


def _broken(path: Path, shards: Sequence[ShardInfo]) -> dict[str, str]:
    """Those whose bytes are not what was written, by their paths in the cache, and what is wrong."""
    names = {f"{SHARD_FOLDER}/{info.name}": info for info in shards}
    found = {name: problem_of(path / name, info) for name, info in names.items()}
    return {name: problem for name, problem in found.items() if problem}


def _broken_vocabulary(path: Path, header: Header) -> dict[str, str]:
    """The same of the vocabulary, if there is one."""
    info = header.vocabulary
    problem = None if info is None else problem_of(path / info.name, info)
    return {} if info is None or problem is None else {info.name: problem}


def _remove(build: CacheBuild, broken: Mapping[str, str]) -> list[str]:
    """The manifest goes last: until then another repair finds what is left."""
    for name in broken:
        if name == VOCABULARY_FILE:
            (build.path / name).unlink(missing_ok=True)
        else:
            build.remove_shard(int(Path(name).name.partition(".")[0]))
    (build.path / MANIFEST_FILE).unlink(missing_ok=True)
    sync_folder(build.path)
    lines = [
        f"{name}: deleted{'' if name == VOCABULARY_FILE else ', with its record'}: it {problem}"
        for name, problem in broken.items()
    ]
    return [*lines, f"{MANIFEST_FILE}: deleted: the dump writes it last"]


def _restore_skipped(path: Path, manifest: Manifest, error: CachekdError) -> None:
    """skipped.jsonl, from the records; `error` says what was wrong with it.

    Raises:
        CachekdError: they do not say what was in it.
    """
    skipped: list[Skipped] = []
    with suppress(CachekdError):
        build = CacheBuild(path, read_plan(path / PLAN_FILE))
        for number in build.noted_numbers():
            skipped += note.skipped if (note := build.noted(number)) else []
    if skipped_info(skipped) != manifest.skipped:
        fix = _how_to_get_it(path, manifest)
        problem = f"{SKIPPED_FILE} is damaged, and the dump's records do not say what was in it"
        raise CachekdError(problem, where=str(path / SKIPPED_FILE), found=error.found, fix=fix)
    write_skipped(path, skipped)


def _refuse_what_stays_broken(path: Path, manifest: Manifest, findings: Sequence[Finding]) -> None:
    """What neither follows from other files nor comes out of the same dump."""
    for finding in findings:
        if finding.path.name in {sketch.name for sketch in manifest.sketches}:
            problem = "the tail sketch cannot be made again: fitted anew it would not fit the shards"
        elif finding.shard is None and finding.path.parent.name == SHARD_FOLDER:
            problem = "the manifest does not fit a shard whose bytes are what was written"
        elif finding.path.name == VOCABULARY_FILE and not _broken_vocabulary(path, manifest):
            problem = "the manifest does not fit a vocabulary whose bytes are what was written"
        else:
            continue
        raise CachekdError(
            problem, where=str(finding.path), found=finding.problem, fix=_how_to_get_it(path, manifest)
        )


def _require_dump(path: Path, manifest: Manifest, name: str, problem: str, require: Require) -> DumpPlan:
    """Refuse to delete what no dump in this folder would make again.

    Args:
        name: of the first file that is broken.
        problem: with it.

    Returns:
        the plan of that dump.
    """
    plan = plan_under(manifest, manifest.sources[0])
    if manifest.lineage or len(manifest.sources) > 1:
        why = "this cache was made of others: no dump makes a file of it again"
    elif not isinstance(plan, DumpPlan):
        why = "the samples of this cache were added one by one: no dump makes a file of it again"
    elif not files_there(path):
        why = "this cache was fetched, or its dump/ is gone: no dump goes on in this folder"
    else:
        require(plan)
        return plan
    raise CachekdError(why, where=str(path / name), found=problem, fix=_how_to_get_it(path, manifest))


def _how_to_get_it(path: Path, manifest: Manifest) -> str:
    """What brings a whole cache back where a repair cannot."""
    fetch = f"if it was published: `cachekd pull ADDRESS {path}` fetches what is broken, and nothing else; "
    if manifest.lineage:
        step, codec = manifest.lineage[-1], manifest.codec
        how = {
            "merge": "-o NEW",
            "select": "-o NEW, with the same conditions",
            "recompress": f"NEW --top-k {codec.top_k} --tail {codec.tail}",
        }
        caches, parents = "CACHE " * len(step.parents), ", ".join(parent[:12] for parent in step.parents)
        return (
            f"{fetch}else make it again of others: `cachekd {step.operation} {caches}{how[step.operation]}`. "
            f"Their manifests have sha256 {parents}; verify these first: they may share files with it"
        )
    if manifest.sources[0].geometry is None:
        return f"{fetch}else make it again, by the program that wrote it"
    return f"{fetch}else dump into a new folder"


def _no_manifest(path: Path, found: str) -> CachekdError:
    return CachekdError(
        "the manifest cannot be written again",
        where=str(path / MANIFEST_FILE),
        expected=f"the plan and the records of a dump in {path / DUMP_FOLDER}, and what they list",
        found=found,
        fix="restore it from where the cache came from, or dump into a new folder",
    )
