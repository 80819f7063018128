"""`cachekd init`: from the names of two models to the file of a whole pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import join, quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cachekd.config.base import option_name
from cachekd.errors import CachekdError
from cachekd.paths import PathOrName
from cachekd.presets.pairs import NOT_RUN, PAIRS, pair_of
from cachekd_cli.console import console, duration, errors, print_result, quiet_libraries, say, table
from cachekd_cli.options import AsJson

if TYPE_CHECKING:
    from cachekd.presets.proposal import Proposal

_SWITCH = {"paper": "as in the paper", "linear": "--switch-bridge linear", "none": "off"}
_MOST_PIXELS = 178_956_970  # of a picture: PIL, and so a dump, refuses larger ones


def init_command(
    pair: Annotated[
        PathOrName | None,
        typer.Argument(
            help="A pair of `--list`; with --teacher and --student the folder alone.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(help="The pipeline's folder, for pipeline.yaml.", show_default=False)
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the pairs that have a name, and stop.")] = False,
    teacher: Annotated[
        PathOrName | None, typer.Option(help="Any teacher, instead of PAIR: a model folder or hub name.")
    ] = None,
    student: Annotated[
        PathOrName | None, typer.Option(help="Any student: a model folder or hub name.")
    ] = None,
    data: Annotated[
        PathOrName | None, typer.Option(help="The training data. Those on this disk are counted.")
    ] = None,
    test_data: Annotated[
        PathOrName | None, typer.Option(help="Held-out questions. With them the file has an eval step.")
    ] = None,
    card: Annotated[
        Literal["24", "48", "80"],
        typer.Option(help="The GPU's memory in GB. The file says what others change."),
    ] = "24",
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many samples disk and time are estimated for. Default: those of --data, or 100000.",
        ),
    ] = None,
    picture: Annotated[
        str, typer.Option(metavar="WxH", help="Pixels of the one picture that a sample is taken to have.")
    ] = "640x480",
    text_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of text in a sample, answers among them.")
    ] = 250,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="How many of these are answer tokens, which the cache keeps.")
    ] = 100,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="What the card computes in practice, in TFLOP/s. Default: 50, 100, 300 at 24, 48, 80 GB.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the file of a whole pipeline for two models: dump, train, evaluate, report.

    Example: cachekd init qwen2.5-vl-7b-3b runs/qwen --data data/train

    Example: cachekd init --teacher models/a --student models/b --data data/train runs/mine --card 48

    Every setting has a comment: what fits the card, how the vision sides fit, what other cards change.
    Memory by part is computed from the configurations, on tensors without memory: no weights are read, and
    for a pair of --list nothing is fetched. Disk and time are estimates. Nothing is ever overwritten.
    """
    if show:
        print_result(as_json, list(PAIRS.values()), lambda _: print_pairs())
        return
    folder = _folder(pair, out, teacher, student)
    width, height = _size(picture)
    if answer_tokens > text_tokens:
        raise CachekdError(
            "there are more answer tokens than tokens",
            where="--answer-tokens",
            expected=f"at most --text-tokens, {text_tokens:,}",
            found=f"{answer_tokens:,}",
        )
    quiet_libraries()
    from cachekd.presets.file import refuse_existing, write
    from cachekd.presets.proposal import count_of, of_models, of_preset, propose
    from cachekd.presets.sample import Assumed

    refuse_existing(folder)
    preset = None if teacher is not None else pair_of(str(pair))
    found = samples or count_of(data)
    if found is None and data is not None:
        say(
            f"{data} is not on this disk, and not counted: {Assumed.samples:,} samples are assumed; "
            "--samples says how many there are",
            errors,
        )
    assumed = Assumed(width, height, text_tokens, answer_tokens, found or Assumed.samples)
    with errors.status("looking at the models", spinner="dots") as status:
        sides = of_preset(preset) if preset is not None else of_models(str(teacher), str(student))
        proposal = propose(
            *sides[:2],
            own_text=sides[2],
            card=int(card),
            assumed=assumed,
            tflops=tflops,
            pair=preset,
            data=data,
            test_data=test_data,
            progress=lambda what: status.update(f"looking at {what}"),
        )
    said = {
        "teacher": teacher,
        "student": student,
        "data": data,
        "test_data": test_data,
        "card": card,
        "samples": samples,
        "picture": None if (width, height) == (Assumed.width, Assumed.height) else picture,
        "text_tokens": None if text_tokens == Assumed.text else text_tokens,
        "answer_tokens": None if answer_tokens == Assumed.answers else answer_tokens,
        "tflops": tflops,
    }
    path = write(proposal, folder, _command(pair, folder, said))
    print_result(
        as_json, proposal, lambda _: print_proposal(proposal, path), lambda _: for_scripts(proposal, path)
    )


def _folder(pair: str | None, out: Path | None, teacher: str | None, student: str | None) -> Path:
    """The pipeline's folder. Of two models it is the one argument that there is.

    Raises:
        CachekdError: it is not said, or something is said twice.
    """
    if (teacher is None) != (student is None):
        missing = "--student" if student is None else "--teacher"
        raise CachekdError("a pair is two models", expected="--teacher and --student", fix=f"add {missing}")
    if teacher is None:
        if pair is None or out is None:
            raise CachekdError(
                "say which pair, and where its pipeline shall be",
                expected="cachekd init PAIR FOLDER",
                found=f"PAIR {pair}, and no folder" if pair else "neither",
                fix="`cachekd init --list` shows the pairs; or name --teacher, --student and FOLDER",
            )
        return out
    if pair is None or out is not None:
        raise CachekdError(
            "with --teacher and --student the folder alone is named",
            expected="cachekd init --teacher A --student B FOLDER",
            found="no folder" if pair is None else f"{pair} and {out}",
        )
    return Path(pair)


def _size(text: str) -> tuple[int, int]:
    """Width and height.

    Raises:
        CachekdError: it is no such text.
    """
    width, _, height = text.lower().partition("x")
    numbers = all(side.isdecimal() and len(side) < 10 for side in (width, height))
    if not numbers or not 1 <= int(width) * int(height) <= _MOST_PIXELS:
        raise CachekdError(
            "no size of a picture",
            where="--picture",
            expected=f"WxH, such as 640x480, of at most {_MOST_PIXELS:,} pixels",
            found=text,
        )
    return int(width), int(height)


def _command(pair: str | None, folder: Path, named: Mapping[str, str | float | None]) -> str:
    """The command as one would type it again, with every option that is not as by default."""
    models = [] if named["teacher"] is not None else [str(pair)]
    said = [
        word for name, value in named.items() if value is not None for word in (option_name(name), f"{value}")
    ]
    return join(["cachekd", "init", *models, str(folder), *said])


def print_pairs() -> None:
    """Print the table of pairs."""
    rows = (
        (
            pair.name,
            f"{_SWITCH[pair.switch]}: {pair.why}"
            + ("; two tokenizers, L_Align over cells" if pair.tokenizers == "two" else ""),
        )
        for pair in PAIRS.values()
    )
    console.print(table("pairs that have a name", ("PAIR", "L_VSD"), rows, texts=2))
    say(f"All of these pairs: {NOT_RUN}.", style="dim")
    say("Any other pair: cachekd init --teacher A --student B FOLDER", style="dim")


def print_proposal(proposal: Proposal, path: Path) -> None:
    """Print what a step holds, what it costs, and what to do next."""
    from cachekd.presets.file import changes, memory_lines

    here, cost, assumed = proposal.here, proposal.cost, proposal.assumed
    say(f"L_VSD {_SWITCH[proposal.fit.switch]}: {proposal.why}")
    if proposal.fit.own_text:
        say("L_Align is computed over cells: the two cut text into different tokens")
    batch, tokens = here.train["batch_size"], len(proposal.ours.encoded)
    title = f"a training step on {here.card} GB, {batch} sample(s) of {tokens:,} tokens, in GB: computed"
    if here.memory is None:
        say("a training step could not be computed: `cachekd train --estimate` measures it")
    else:
        console.print(table(title, ("", ""), memory_lines(proposal)))
    if not here.fits:
        say(
            "it does not fit, as computed; the file says what is left to try",
            errors,
            style="bold yellow",
        )
    rows = [
        (
            "cache",
            f"{cost.cache_bytes / 1e9:,.2f} GB",
            f"{assumed.samples:,} x {assumed.answers} answer tokens",
        ),
        ("dump", duration(cost.dump_seconds), f"at a sustained {cost.tflops:g} TFLOP/s: an estimate"),
        ("a pass of training", duration(cost.train_seconds), "an estimate too"),
    ]
    console.print(table("disk and time", ("", "", "of"), rows))
    for other in proposal.chosen:
        if other != proposal.card:
            say(f"at {other} GB: {changes(proposal, other)}")
    say(f"wrote {path}: read it, then  cachekd run {quote(str(path))}", style="green")


def for_scripts(proposal: Proposal, path: Path) -> dict[str, Any]:
    """The same as JSON has it."""
    cost = proposal.cost
    return {
        "file": path,
        "pair": None if proposal.pair is None else proposal.pair.name,
        "models": {
            name: {
                "name": side.name,
                "parameters": side.parameters,
                "image_tokens": read.image_tokens,
                "unverified": side.unverified,
            }
            for name, side, read in (
                ("teacher", proposal.teacher, proposal.theirs),
                ("student", proposal.student, proposal.ours),
            )
        },
        "fit": proposal.fit,
        "losses": proposal.losses(),
        "assumed": proposal.assumed,
        "card": proposal.card,
        "cards": {
            card: {"train": one.train, "dump": one.dump, "memory": one.memory, "fits": one.fits}
            for card, one in proposal.chosen.items()
        },
        "cache_bytes": cost.cache_bytes,
        "tflops": cost.tflops,
        "dump_seconds": cost.dump_seconds,
        "train_seconds": cost.train_seconds,
    }
