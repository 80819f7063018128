"""`cachekd verify`: is a cache what it was; `cachekd status`: how far is a dump."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekd.config import DataOptions
from cachekd.errors import CachekdError
from cachekd.paths import PathOrName
from cachekd_cli.console import (
    byte_progress,
    console,
    count_progress,
    errors,
    print_json,
    progress_bar,
    quiet_libraries,
    say,
    say_wrong,
    table,
    visible,
)
from cachekd_cli.options import AsJson, Binding, CacheFolder, takes

if TYPE_CHECKING:
    from cachekd.cache import Finding
    from cachekd.dump.recheck import Recheck


SHOWN = 20


@takes(DataOptions)
def verify_command(
    data: DataOptions | None,
    cache: CacheFolder,
    teacher: Annotated[
        PathOrName | None,
        typer.Option(help="Ask this teacher again (with --data)."),
    ] = None,
    binding: Binding = None,
    sample: Annotated[int, typer.Option(min=1, help="How many samples the teacher is asked again.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of samples.")] = 0,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Delete broken shards, so that the same dump makes them again."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a cache: every file against its checksum; with --teacher and --data, values against the teacher.

    Exit code 1 if anything is wrong. What is not said of the data is as in the dump; a bad sample counts as a
    mismatch, whatever --on-error says. What a repair deletes it names, with the command that makes it again;
    a cache that was fetched or made of others it leaves as it is, and says what to run.

    Example: cachekd verify caches/llava-7b --teacher models/llava-7b --data data/train --sample 64
    """
    from cachekd.cache.layout import require_manifest

    quiet_libraries()
    if (teacher is None) != (data is None):
        raise CachekdError("--teacher and --data go together", fix="pass both, or none")
    if binding is not None and teacher is None:
        raise CachekdError(
            "--binding is for asking the teacher again",
            expected="--teacher and --data beside it",
            fix="leave --binding out",
        )
    require_manifest(cache)
    found, live = check_files(cache), None
    done, again = run_repair(cache, found) if repair and found else ([], None)
    if done and again is None:
        found = check_files(cache)
    if teacher is not None and data is not None and not found:
        live = ask_again(cache, teacher, data, binding, sample, seed)
    if as_json:
        print_json(as_dict(cache, found, done, again, live))
    else:
        print_result(cache, found, done, again, live)
    if found or (live is not None and live.mismatches):
        raise typer.Exit(1)


def check_files(cache: Path) -> list[Finding]:
    """Compare checksums behind a progress bar."""
    from cachekd.cache import Finding, Manifest, verify_files
    from cachekd.paths import MANIFEST_FILE

    try:
        manifest = Manifest.load(cache)
    except CachekdError as error:
        return [Finding(cache / MANIFEST_FILE, f"{error.problem}: {error.found}")]
    with progress_bar("MB") as bar:
        advance, _ = byte_progress(bar, "verify", manifest.size + manifest.sketch_bytes)
        return verify_files(cache, advance)


def run_repair(cache: Path, found: list[Finding]) -> tuple[list[str], str | None]:
    """Repair; return what was done, and the command that makes again what was deleted (None: nothing was)."""
    from cachekd.cache.repair import repair
    from cachekd.dump.plan import command_of, require_same_code

    repaired = repair(cache, found, lambda plan: require_same_code(plan, cache))
    return repaired.done, None if repaired.plan is None else command_of(
        repaired.plan, cache, skips=repaired.skips
    )


def ask_again(
    cache: Path, teacher: str, data: DataOptions, binding: Path | None, count: int, seed: int
) -> Recheck:
    """Run some samples again behind a progress bar."""
    from cachekd.check.bind import open_bound
    from cachekd.check.data import as_dumped
    from cachekd.data import open_samples
    from cachekd.dump.recheck import recheck
    from cachekd.dump.run import load_teacher, teacher_files

    opened = open_bound(cache, binding)
    options = as_dumped(data, opened.manifest.sources[0].data, str(cache), bound=binding is not None)
    samples = open_samples(options)
    files, manifest = teacher_files(teacher, options), opened.manifest
    model = load_teacher(files, samples, "skip", manifest.codec, manifest.teacher.dtype)
    with progress_bar("samples") as bar:
        advance = count_progress(bar, "ask again", min(count, len(opened)))
        return recheck(opened, model, samples, count, seed=seed, progress=advance)


def as_dict(
    cache: Path, found: list[Finding], done: list[str], again: str | None, live: Recheck | None
) -> dict[str, Any]:
    """What scripts get."""
    from cachekd.dump.recheck import SHARES

    result: dict[str, Any] = {
        "cache": str(cache),
        "ok": not found and not (live and live.mismatches),
        "problems": [{"file": str(f.path), "problem": f.problem, "shard": f.shard} for f in found],
        "repaired": done,
        "run": again,
        "strays": [str(path) for path in find_strays(cache)],
    }
    if live is not None:
        result["teacher"] = {
            **{name: value for name, value in live.__dict__.items() if name != "mismatches"},
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


def print_result(
    cache: Path, found: list[Finding], done: list[str], again: str | None, live: Recheck | None
) -> None:
    """Print what was wrong, what was done about it, and how sure one can be."""
    from cachekd.cache import Manifest

    for line in done:
        say(line)
    if again is not None:
        say(f"what was deleted is made again by the same dump:\n{visible(again)}")
        return
    for path in find_strays(cache)[:SHOWN]:
        say(f"note: {path} is no part of the cache")
    for finding in found:
        say_wrong(str(finding.path), finding.problem)
    if found:
        say(f"try: cachekd verify --repair {cache}", errors)
        return
    manifest = Manifest.load(cache)
    say(
        f"{cache}: {len(manifest.shards):,} shards with {manifest.samples:,} samples and {manifest.tokens:,} "
        "answer tokens are what was written"
    )
    if live is not None:
        print_live(live)


def print_live(live: Recheck) -> None:
    """Print how far the cache is from what the teacher says now."""
    from cachekd.dump.recheck import SHARES

    rows = [
        ("samples asked again", f"{live.samples:,} of {live.all_samples:,} ({live.tokens:,} tokens)"),
        ("largest error of a kept logprob", f"{live.max_error:.4f} nats (bound {live.bound:.4f})"),
        ("largest error of a sketch code", f"{live.max_code_error:.0f} steps (bound {live.code_bound:.2f})"),
        ("samples beyond a bound", f"{len(live.mismatches):,}"),
    ]
    if live.absent:
        rows.append(("samples that this data set lacks", f"{live.absent:,}"))
    rows += [
        (f"if {share:.0%} were bad, seen with", f"{100 * live.detection(share):.1f} % probability")
        for share in SHARES
    ]
    console.print(table("against the teacher", ("", "value"), rows))
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

    status = dump_status(cache)
    if as_json:
        print_json(status.__dict__)
        return
    share = 100 * status.shards / max(1, status.all_shards)
    rows = [
        ("shards", f"{status.shards:,} of {status.all_shards:,} ({share:.0f} %)"),
        ("samples", f"{status.samples:,} of {status.all_samples:,}"),
        ("left out", f"{status.skipped:,}"),
        ("answer tokens", f"{status.tokens:,}"),
        ("size", f"{status.bytes / 1e6:,.2f} MB"),
        ("teacher", status.teacher),
        ("data", status.data),
    ]
    console.print(table(f"{'cache' if status.finished else 'dump'} {cache}", ("", "value"), rows))
    if not status.finished:
        say("not finished: the same `cachekd dump` goes on with it")
