"""`cachekd verify`: is a cache what was written, and what the teacher says?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekd.errors import CachekdError
from cachekd_cli.console import (
    console,
    errors,
    print_json,
    progress_bar,
    quiet_libraries,
    sample_progress,
    table,
)

if TYPE_CHECKING:
    from cachekd.cache import Finding, Manifest
    from cachekd.recheck import Recheck
    from cachekd.samples import Samples
    from cachekd.teacher import Teacher


def verify_command(
    cache: Annotated[Path, typer.Argument(help="The cache's folder.")],
    teacher: Annotated[
        str | None, typer.Option(help="Ask this teacher again (with --data), and make repairs with it.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The data set that was dumped.")] = None,
    map_function: Annotated[
        str | None, typer.Option("--map", help="As for the dump; default: what the manifest names.")
    ] = None,
    sample: Annotated[int, typer.Option(help="How many samples the teacher is asked again.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make broken files again: shards need --teacher and --data.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that read samples for a repair.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check a cache: every file against its checksum; with --teacher and --data, values against the teacher.

    Exit code 1 if anything is wrong.

    Example: cachekd verify caches/llava-7b --teacher models/llava-7b --data data/train --sample 64
    """
    quiet_libraries()
    if (teacher is None) != (data is None):
        raise CachekdError("--teacher and --data go together", fix="pass both, or none")
    done = mend_manifest(cache) if repair else []
    found = check_files(cache)
    live = None
    if repair and found:
        done += run_repair(cache, found, teacher, data, map_function, workers)
        found = check_files(cache)
    if teacher is not None and data is not None and not found:
        live = ask_again(cache, teacher, data, map_function, sample, seed)
    if as_json:
        print_json(as_dict(cache, found, done, live))
    else:
        print_result(cache, found, done, live)
    if found or (live is not None and live.mismatches):
        raise typer.Exit(1)


def check_files(cache: Path) -> list[Finding]:
    """Checksums behind a progress bar."""
    from cachekd.cache import Manifest, verify_files

    manifest = Manifest.load(cache)
    with progress_bar("MB") as bar:
        task = bar.add_task("verify", total=manifest.size + manifest.sketch_bytes, units=0, note="")

        def advance(size: int) -> None:
            bar.update(task, advance=size, units=bar.tasks[task].completed / 1e6)

        return verify_files(cache, advance)


def mend_manifest(cache: Path) -> list[str]:
    """A manifest that cannot be read is written again from the dump's records."""
    from cachekd.cache import Manifest
    from cachekd.cache.manifest import MANIFEST_FILE
    from cachekd.repair import restore_manifest

    try:
        Manifest.load(cache)
    except CachekdError:
        if not (cache / MANIFEST_FILE).exists():
            raise
        restore_manifest(cache)
        return [f"{MANIFEST_FILE}: written again from the dump's records"]
    return []


def run_repair(
    cache: Path,
    found: list[Finding],
    teacher: str | None,
    data: str | None,
    map_function: str | None,
    workers: int,
) -> list[str]:
    """What can be mended is; shards by the teacher."""
    from cachekd.cache import Manifest
    from cachekd.repair import repair, tidy

    done = tidy(cache, found)
    broken = [finding for finding in found if finding.shard is not None or "sketch" in finding.path.name]
    if not broken:
        return done
    if teacher is None or data is None:
        raise CachekdError(
            f"{len(broken)} files can only be made again by the teacher",
            where=str(broken[0].path),
            found=broken[0].problem,
            fix="add --teacher and --data",
        )
    manifest = Manifest.load(cache)
    samples = open_source(
        manifest, data, map_function, next((f.shard for f in broken if f.shard is not None), 0)
    )
    with progress_bar("tokens") as bar:
        spans = [manifest.shards[f.shard].span or (0, 0) for f in broken if f.shard is not None]
        total = sum(last - first for first, last in spans)
        advance = sample_progress(bar, "repair", total)
        model = open_teacher(manifest, teacher, samples)
        return done + repair(cache, broken, model, samples, workers=workers, progress=advance)


def ask_again(
    cache: Path, teacher: str, data: str, map_function: str | None, count: int, seed: int
) -> Recheck:
    """Run some samples again behind a progress bar."""
    from cachekd.cache import LogitCache
    from cachekd.recheck import recheck

    opened = LogitCache(cache)
    samples = open_source(opened.manifest, data, map_function, None)
    model = open_teacher(opened.manifest, teacher, samples)
    with progress_bar("samples") as bar:
        advance = sample_progress(bar, "ask again", min(count, len(opened)))
        return recheck(opened, model, samples, count, seed=seed, progress=lambda done: advance(done, done))


def open_source(manifest: Manifest, data: str, map_function: str | None, shard: int | None) -> Samples:
    """The data set as the dump of a shard read it; the whole of it where no shard is meant."""
    from cachekd.samples import open_samples

    info = manifest.sources[manifest.shards[shard or 0].source].data
    name = map_function or info.map
    if shard is None:
        return open_samples(data, map=name)
    return open_samples(data, map=name, limit=info.limit, shuffle_seed=info.shuffle_seed)


def open_teacher(manifest: Manifest, path: str, samples: Samples) -> Teacher:
    """The teacher as it ran for the dump."""
    from cachekd.dump import open_teacher

    return open_teacher(path, samples, manifest.codec, manifest.teacher.dtype, on_error="skip")


def as_dict(cache: Path, found: list[Finding], done: list[str], live: Recheck | None) -> dict[str, Any]:
    """For `--json`."""
    from cachekd.recheck import SHARES

    result: dict[str, Any] = {
        "cache": str(cache),
        "ok": not found and not (live and live.mismatches),
        "problems": [{"file": str(f.path), "problem": f.problem, "shard": f.shard} for f in found],
        "repaired": done,
    }
    if live is not None:
        result["teacher"] = {
            **{name: value for name, value in live.__dict__.items() if name != "mismatches"},
            "mismatches": [mismatch._asdict() for mismatch in live.mismatches],
            "detection": {str(share): live.detection(share) for share in SHARES},
        }
    return result


def print_result(cache: Path, found: list[Finding], done: list[str], live: Recheck | None) -> None:
    """What was wrong, what was mended, and how sure one can be."""
    from cachekd.cache import Manifest

    for line in done:
        console.print(line, highlight=False, soft_wrap=True)
    for finding in found:
        errors.print(f"[bold red]{finding.path}[/] {finding.problem}", highlight=False, soft_wrap=True)
    if found:
        errors.print("try: cachekd verify --repair, with --teacher and --data for shards", soft_wrap=True)
        return
    manifest = Manifest.load(cache)
    console.print(
        f"{cache}: {len(manifest.shards):,} shards with {manifest.samples:,} samples and {manifest.tokens:,} "
        "answer tokens are what was written",
        highlight=False,
        soft_wrap=True,
    )
    if live is not None:
        print_live(live)


def print_live(live: Recheck) -> None:
    """The teacher's word."""
    from cachekd.recheck import SHARES

    rows = [
        ("samples asked again", f"{live.samples:,} of {live.all_samples:,} ({live.tokens:,} tokens)"),
        ("largest error of a kept logprob", f"{live.max_error:.4f} nats (bound {live.bound:.4f})"),
        ("largest error of a sketch code", f"{live.max_code_error:.0f} steps (bound {live.code_bound:.2f})"),
        ("samples beyond a bound", f"{len(live.mismatches):,}"),
    ]
    rows += [
        (f"if {share:.0%} were bad, seen with", f"{100 * live.detection(share):.1f} % probability")
        for share in SHARES
    ]
    console.print(table("against the teacher", ("", "value"), rows))
    for mismatch in live.mismatches[:20]:
        errors.print(f"[bold red]{mismatch.key!r}[/] {mismatch.problem}", highlight=False, soft_wrap=True)
