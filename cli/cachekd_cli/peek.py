"""`cachekd peek`: single samples of a cache, token by token."""

from __future__ import annotations

from collections.abc import Container
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from cachekd.config import DataOptions
from cachekd.config.fields import ALTERNATIVES, PAGE_ALTERNATIVES, PAGE_SAMPLES, Order
from cachekd.errors import BadSample
from cachekd.paths import PathOrName
from cachekd_cli.console import (
    console,
    counting_samples,
    errors,
    print_result,
    quiet_libraries,
    say,
    visible,
    write_page,
)
from cachekd_cli.options import AsJson, Binding, CacheFolder, takes

if TYPE_CHECKING:
    from cachekd.cache import LogitCache
    from cachekd.data import Sample
    from cachekd.report.paired import Paired, PairedPlace, PairedStudent
    from cachekd.report.peek import Alternative, PeekedData, PeekedMessage, PeekedSample, PeekedToken
    from cachekd.report.token_texts import TokenReader


BAR_WIDTH = 16
ORIGIN_STYLES = {"kept": "blue", "sketch": "magenta", "spread": "white"}  # stored, rebuilt, or made up


@takes(DataOptions)
def peek_command(
    data: DataOptions | None,
    cache: CacheFolder,
    sample_key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="A sample's key; default: chosen by --order and --samples."),
    ] = None,
    binding: Binding = None,
    tokenizer: Annotated[
        PathOrName | None,
        typer.Option(help="Folder or hub name; default: the teacher's, if its folder is here."),
    ] = None,
    student: Annotated[
        PathOrName | None,
        typer.Option(help="A model whose answer tokens, and which of them are aligned, are shown beside."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help=f"Alternatives per token; default: {ALTERNATIVES}, with --html {PAGE_ALTERNATIVES}.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help=f"How many samples; default: 1, with --html {PAGE_SAMPLES}."),
    ] = None,
    order: Annotated[
        Order, typer.Option(help="The first samples, or those whose answers surprise the teacher most.")
    ] = "first",
    html: Annotated[Path | None, typer.Option(help="Write a page to click through.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the teacher's view of each answer token: its probability, the alternatives, entropy, k.

    Example: cachekd peek caches/llava-7b --data data/train --order surprising --html peek.html
    """
    from cachekd.atomic import require_place
    from cachekd.check.bind import open_bound
    from cachekd.report.peek import choose
    from cachekd.report.token_texts import find_reader

    if html is not None:
        require_place(html)
    quiet_libraries()
    opened = open_bound(cache, binding)
    reader = find_reader(opened, tokenizer)
    if tokenizer is None and reader.processor is None and reader.vocabulary is None:
        note = f"no tokenizer: {opened.manifest.teacher.name} is not here; ids are shown (--tokenizer PATH)"
        say(note, errors)
    seen = None if data is None else open_data(opened, data, reader, bound=binding is not None)
    if sample_key is not None:
        opened.shard_of(sample_key)  # a key that the cache lacks is refused before the data are asked
        keys = [sample_key]
    else:
        there: Container[str] = opened if seen is None else seen
        with errors.status("choosing samples"):
            keys = choose(opened, samples or (1 if html is None else PAGE_SAMPLES), order, there)
    skip = data is not None and data.on_error == "skip"
    shown = top or (ALTERNATIVES if html is None else PAGE_ALTERNATIVES)
    beside = None if student is None else open_student(student, reader)
    found, images = look(opened, keys, seen, reader, shown, beside, with_images=html is not None, skip=skip)
    if html is not None:
        from cachekd.report.pages import peek_page

        write_page(html, peek_page(str(cache), opened.manifest, found, images))
    if as_json or html is None:
        print_result(as_json, found, print_samples)


def open_data(
    cache: LogitCache, data: DataOptions, reader: TokenReader, *, bound: bool = False
) -> PeekedData:
    """Open the data set, read by key."""
    from cachekd.check.data import as_dumped
    from cachekd.data import open_samples
    from cachekd.report.peek import PeekedData

    return PeekedData(cache, open_samples(as_dumped(data, cache, bound=bound)), reader.processor)


def open_student(student: str, reader: TokenReader) -> PairedStudent:
    """Open the tokenizer of a student, and find what its tokens and the teacher's have in common."""
    from cachekd.models import ModelFiles
    from cachekd.report.paired import PairedStudent

    with errors.status("comparing the vocabularies"):
        return PairedStudent(ModelFiles(student), reader.token_bytes)


def look(
    cache: LogitCache,
    keys: list[str],
    data: PeekedData | None,
    reader: TokenReader,
    top: int,
    student: PairedStudent | None = None,
    *,
    with_images: bool,
    skip: bool = False,
) -> tuple[list[PeekedSample], list[list[str]]]:
    """Look at samples; return them, and the images of each as a page embeds them.

    Args:
        skip: show what the cache has of a sample that cannot be read.
    """
    from cachekd.report.peek import embedded, peek

    found, images, text_of = [], [], reader.texts.__getitem__
    with counting_samples("peek", len(keys), hidden=len(keys) == 1) as advance:
        for key in keys:
            sample = None if data is None else read_sample(data, key, skip=skip)
            turns = None if data is None or sample is None else data.turns(sample)
            found.append(
                peek(
                    cache,
                    key,
                    text_of=text_of,
                    sample=sample,
                    turns=turns,
                    alternatives=top,
                    student=student,
                )
            )
            images.append([embedded(image) for image in sample.images] if sample and with_images else [])
            advance(1)
    return found, images


def read_sample(data: PeekedData, key: str, *, skip: bool) -> Sample | None:
    """Read a sample from the data set; None for a bad one that is skipped.

    Raises:
        CachekdError: it cannot be read, or is not the one that the teacher saw.
    """
    try:
        return data[key]
    except BadSample as error:
        if not skip:
            raise
        say(f"{error.where}: {error.problem}", errors)
        return None


def print_samples(samples: list[PeekedSample]) -> None:
    """Print samples in the terminal."""
    for sample in samples:
        print_sample(sample)


def print_sample(sample: PeekedSample) -> None:
    """Print one sample in the terminal."""
    surprise = f"  surprise {sample.surprise:.3f} nats, "
    say(Text.assemble((visible(sample.key), "bold"), surprise, sample.shard))
    for number, size in enumerate(sample.images or []):
        say(f"image {number + 1}: {size.width} x {size.height} pixels")
    if sample.messages is None or any(token.turn is None for token in sample.tokens):
        for message in sample.messages or []:
            print_message(message)
        console.print(token_table(sample.tokens))
    else:
        turn = 0
        for message in sample.messages:
            print_message(message)
            if message.supervised:
                console.print(token_table([token for token in sample.tokens if token.turn == turn]))
                turn += 1
    if sample.paired is not None:
        print_paired(sample.tokens, sample.paired)


def print_paired(tokens: list[PeekedToken], paired: Paired) -> None:
    """Print a sample's answer tokens beside a student's, and which of them are aligned."""
    counts = f"{paired.aligned:,} of {len(paired.tokens):,} answer tokens of "
    say(Text.assemble((counts, "dim"), (visible(paired.student), "bold"), (" are aligned", "dim")))
    if paired.differs is not None:
        say(f"none is: {paired.differs}", style="yellow")
        say(f"teacher: {' | '.join(spelled(token.text) for token in tokens)}")
        say(f"student: {' | '.join(spelled(token.text) for token in paired.tokens)}")
        return
    result = Table(box=None, padding=(0, 1), show_edge=False, header_style="dim")
    for name in ("teacher", "student", "", "cell"):
        result.add_column(name)
    for place in paired.places:
        style = "green" if place.state == "aligned" else "yellow"
        texts = (
            "" if number is None else spelled(side[number].text)
            for number, side in ((place.teacher, tokens), (place.student, paired.tokens))
        )
        result.add_row(*(Text(text, style=style) for text in (*texts, place.state, cells_of(place))))
    console.print(result)


def cells_of(place: PairedPlace) -> str:
    """Name the cell of an aligned place, or the two of one whose tokens are in different cells."""
    if place.state == "aligned":
        return spelled(place.teacher_cell or "")
    if place.state == "other cells":
        sides = (place.teacher, place.teacher_cell), (place.student, place.student_cell)
        return " and ".join(
            "none" if cell is None else spelled(cell) for number, cell in sides if number is not None
        )
    return ""


def print_message(message: PeekedMessage) -> None:
    """Print who says what."""
    images = "[image] " * message.images
    console.print(Text.assemble((f"{message.role}: ", "dim"), (images, "magenta"), visible(message.text)))


def token_table(tokens: list[PeekedToken]) -> Table:
    """A table with some rows for each token: the answer's first, then the alternatives."""
    result = Table(box=None, padding=(0, 1), show_edge=False, header_style="dim")
    for name, justify in (("token", "left"), ("probability", "right"), ("", "left"), ("", "left")):
        result.add_column(name, justify=justify)  # type: ignore[arg-type]  # a Literal
    for token in tokens:
        style = probability_style(token.logprob)
        result.add_row(
            Text(shown(token.text), style=f"bold {style}"),
            Text(percent(token.logprob), style=f"bold {style}"),
            drawn(token, style),
            Text.assemble(
                (token.origin, ORIGIN_STYLES[token.origin]),
                f"  rank {token.rank}  entropy {token.entropy:.3f}  k {token.k}",
            ),
        )
        for one in token.alternatives:
            if one.id != token.id:
                result.add_row(
                    Text(f"  {shown(one.text)}", style="dim"),
                    Text(percent(one.logprob), style="dim"),
                    drawn(one, ORIGIN_STYLES[one.origin]),
                    Text(one.origin, style=ORIGIN_STYLES[one.origin]),
                )
    return result


def drawn(one: Alternative | PeekedToken, color: str) -> Bar:
    """Draw a probability as a bar."""
    return Bar(1.0, 0.0, min(1.0, exp(one.logprob)), width=BAR_WIDTH, color=color)


def shown(text: str) -> str:
    """Write a token's text; nothing but white space is shown by a sign."""
    return visible(text) if text.strip(" ") else "␣" * len(text)


def spelled(text: str) -> str:
    """Write the text of a token by itself: its leading space counts."""
    return shown(text) if text[:1] != " " else f"␣{shown(text)[1:]}"


def percent(logprob: float) -> str:
    """Write a probability in few characters."""
    value = 100 * min(1.0, exp(logprob))
    return f"{value:.1f} %" if value >= 1 else f"{value:.3f} %" if value >= 0.001 else f"{value:.0e} %"


def probability_style(logprob: float) -> str:
    """Green for what the teacher was sure of, red for what it did not expect."""
    value = exp(logprob)
    return "green" if value >= 0.5 else "yellow" if value >= 0.1 else "red"
