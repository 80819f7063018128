"""`cachekd verify`: is a cache what it was; `cachekd status`: how far is a dump."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekd.config import DataOptions
from cachekd.config.base import read_config
from cachekd.config.loading import LoadOptions
from cachekd.errors import CachekdError
from cachekd.paths import PathOrName
from cachekd_cli.console import (
    counting_bytes,
    counting_samples,
    errors,
    if_any,
    print_result,
    print_values,
    quiet_libraries,
    say,
    say_wrong,
    visible,
)
from cachekd_cli.options import AsJson, Binding, CacheFolder, takes

if TYPE_CHECKING:
    from cachekd.cache import Finding
    from cachekd.cache.build import Status
    from cachekd.dump.recheck import Recheck


SHOWN = 20


@dataclass(frozen=True)
class Verified:
    """What was found, and done about it.

    Attributes:
        found: what is wrong with files.
        done: what a repair did.
        again: the command that makes again what it deleted; None: nothing was.
        live: what the teacher said, if it was asked.
    """

    cache: Path
    found: list[Finding]
    done: list[str] = field(default_factory=list)
    again: str | None = None
    live: Recheck | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.found and (self.live is None or self.live.ok)


@takes(DataOptions)
def verify_command(
    data: DataOptions | None,
    cache: CacheFolder,
    teacher: Annotated[
        PathOrName | None,
        typer.Option(help="Ask this teacher again (with --data)."),
    ] = None,
    binding: Binding = None,
    device_map: Annotated[
        PathOrName | None, typer.Option(help="Where the teacher's layers lie, as in a dump.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="The most that its weights take, by device, as in a dump.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="How many samples the teacher is asked again.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of samples.")] = 0,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Delete broken shards, so that the same dump makes them again."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a cache: every file against its checksum; with --teacher and --data, values against the teacher.

    The exit code is 1 if anything is wrong. Data options that you leave out are those of the dump. A bad
    sample counts as a mismatch, whatever --on-error says. A repair names the files that it deletes, and the
    command that makes them again. It changes nothing in a cache that was fetched or made of others, and says
    what to run instead.

    Example: cachekd verify caches/llava-7b --teacher models/llava-7b --data data/train --sample 64
    """
    from cachekd.cache.layout import require_manifest

    quiet_libraries()
    if (teacher is None) != (data is None):
        raise CachekdError("--teacher and --data go together", fix="pass both, or none")
    for_teacher = {"--binding": binding, "--device-map": device_map, "--max-memory": max_memory}
    if teacher is None and (said := [name for name, value in for_teacher.items() if value is not None]):
        names = " and ".join(said)
        raise CachekdError(
            f"{names} {'is' if len(said) == 1 else 'are'} for asking the teacher again",
            expected="--teacher and --data beside it",
            fix=f"leave {names} out",
        )
    require_manifest(cache)
    placed = {"device_map": device_map, "max_memory": max_memory}
    loading = read_config(None, LoadOptions, placed)
    if teacher is not None:
        from cachekd.models import ModelFiles

        ModelFiles(teacher).require_device_map(device_map)
    verified = Verified(cache, check_files(cache))
    if repair and verified.found:
        verified = run_repair(verified)
    if teacher is not None and data is not None and not verified.found:
        verified = replace(verified, live=ask_again(cache, teacher, data, binding, loading, sample, seed))
    print_result(as_json, verified, print_verified, as_dict)
    if not verified.ok:
        raise typer.Exit(1)


def check_files(cache: Path) -> list[Finding]:
    """Compare checksums behind a progress bar."""
    from cachekd.cache import Finding, Manifest, verify_files
    from cachekd.paths import MANIFEST_FILE

    try:
        manifest = Manifest.load(cache)
    except CachekdError as error:
        return [Finding(cache / MANIFEST_FILE, f"{error.problem}: {error.found}")]
    size = manifest.size + manifest.sketch_bytes + manifest.vocabulary_bytes
    with counting_bytes("verify", size) as (advance, _):
        return verify_files(cache, advance)


def run_repair(verified: Verified) -> Verified:
    """Repair, and look again where nothing had to be deleted."""
    from cachekd.cache.repair import repair
    from cachekd.dump.plan import command_of, require_same_code

    cache = verified.cache
    repaired = repair(cache, verified.found, lambda plan: require_same_code(plan, cache))
    if repaired.plan is not None:
        again = command_of(repaired.plan, cache, skips=repaired.skips)
        return replace(verified, done=repaired.done, again=again)
    return Verified(cache, check_files(cache) if repaired.done else verified.found, repaired.done)


def ask_again(
    cache: Path,
    teacher: str,
    data: DataOptions,
    binding: Path | None,
    loading: LoadOptions,
    count: int,
    seed: int,
) -> Recheck:
    """Run some samples again behind a progress bar, by the teacher quantised as it was."""
    from cachekd.check.bind import open_bound
    from cachekd.check.data import as_dumped
    from cachekd.data import open_samples
    from cachekd.dump.recheck import recheck
    from cachekd.dump.run import load_teacher, teacher_files

    opened = open_bound(cache, binding)
    options = as_dumped(data, opened, bound=binding is not None)
    samples = open_samples(options)
    files, manifest = teacher_files(teacher, options), opened.manifest
    quantised = manifest.teacher.quantization
    kernels = {source.attn_implementation for source in manifest.sources}
    as_it_was = {
        "quantization": quantised and quantised.setting,
        "attn_implementation": kernels.pop() if len(kernels) == 1 else None,
    }
    model = load_teacher(
        files,
        samples,
        "skip",
        manifest.codec,
        manifest.teacher.dtype,
        float32_head=all(source.float32_head for source in manifest.sources),
        **loading.model_copy(update=as_it_was).load_settings,
    )
    with counting_samples("ask again", min(count, len(opened))) as advance:
        return recheck(opened, model, samples, count, seed=seed, progress=advance)


def as_dict(verified: Verified) -> dict[str, Any]:
    """What scripts get."""
    from cachekd.dump.recheck import SHARES

    result: dict[str, Any] = {
        "cache": verified.cache,
        "ok": verified.ok,
        "problems": [{"file": f.path, "problem": f.problem, "shard": f.shard} for f in verified.found],
        "repaired": verified.done,
        "run": verified.again,
        "strays": find_strays(verified.cache),
    }
    if (live := verified.live) is not None:
        result["teacher"] = {
            **vars(live),
            "mismatches": [mismatch._asdict() for mismatch in live.mismatches],
            "detection": {str(share): live.detection(share) for share in SHARES},
        }
    return result


def find_strays(cache: Path) -> list[Path]:
    """Find what lies in the folder and is no part of the cache; without a manifest nothing is known of it."""
    from cachekd.cache.verify import strays

    try:
        return strays(cache)
    except CachekdError:
        return []


def print_verified(verified: Verified) -> None:
    """Print what was wrong, what was done about it, and how sure one can be."""
    from cachekd.cache import Manifest

    cache = verified.cache
    for line in verified.done:
        say(line)
    if verified.again is not None:
        say(f"what was deleted is made again by the same dump:\n{visible(verified.again)}")
        return
    for path in find_strays(cache)[:SHOWN]:
        say(f"note: {path} is no part of the cache")
    for finding in verified.found:
        say_wrong(str(finding.path), finding.problem)
    if verified.found:
        say(f"try: cachekd verify --repair {cache}", errors)
        return
    manifest = Manifest.load(cache)
    say(
        f"{cache}: {len(manifest.shards):,} shards with {manifest.samples:,} samples and {manifest.tokens:,} "
        "answer tokens are what was written"
    )
    if verified.live is not None:
        print_live(verified.live)


def print_live(live: Recheck) -> None:
    """Print how far the cache is from what the teacher says now."""
    from cachekd.dump.recheck import SHARES

    values = {
        "samples asked again": f"{live.samples:,} of {live.all_samples:,} ({live.tokens:,} tokens)",
        "largest error of a kept logprob": f"{live.max_error:.4f} nats (bound {live.bound:.4f})",
        "largest error of a sketch code": f"{live.max_code_error:.0f} steps (bound {live.code_bound:.2f})",
        "samples beyond a bound": f"{len(live.mismatches):,}",
        "samples that this data set lacks": if_any(live.absent),
    }
    for share in SHARES:
        values[f"chance to find one, if {share:.0%} of all samples were bad"] = f"{live.detection(share):.1%}"
    print_values("against the teacher", values)
    if live.vocabulary is not None:
        say_wrong("the vocabulary", live.vocabulary)
    for mismatch in live.mismatches[:SHOWN]:
        say_wrong(repr(mismatch.key), mismatch.problem)


def status_command(
    cache: Annotated[Path, typer.Argument(help="The folder of a cache or of a dump under way.")],
    as_json: AsJson = False,
) -> None:
    """Show how much of a dump is done, while it runs or after it was stopped.

    Example: cachekd status caches/llava-7b
    """
    from cachekd.cache.build import dump_status

    print_result(as_json, dump_status(cache), partial(print_status, cache=cache))


def print_status(status: Status, cache: Path) -> None:
    """Print how much is done."""
    share = 100 * status.shards / max(1, status.all_shards)
    values = {
        "shards": f"{status.shards:,} of {status.all_shards:,} ({share:.0f} %)",
        "samples": f"{status.samples:,} of {status.all_samples:,}",
        "left out": f"{status.skipped:,}",
        "answer tokens": f"{status.tokens:,}",
        "size": f"{status.bytes / 1e6:,.2f} MB",
        "teacher": status.teacher,
        "data": status.data,
    }
    print_values(f"{'cache' if status.finished else 'dump'} {cache}", values)
    if not status.finished:
        say("not finished: the same `cachekd dump` goes on with it")
