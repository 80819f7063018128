"""Whether teacher and student cut a sample's pictures into the same tiles, each by its own processor."""

from __future__ import annotations

import re

from cachekd.check.rows import Row
from cachekd.data import Encoded, SampleEncoder
from cachekd.errors import BadSample, CachekdError
from cachekd.losses.terms import WITHOUT_SWITCH
from cachekd.models import ModelFiles

# What Idefics3's and SmolVLM's processors write before a tile: its row and column, or that it is the whole.
_TILE = re.compile(r"<row_\d+_col_\d+>|<global-img>")


def tiles_of(encoded: Encoded, encoder: SampleEncoder) -> list[str]:
    """The tiles of a sample's pictures in their order, as the text names them.

    Args:
        encoder: what encoded it. Its tokenizer may have one token for a name or several.
    """
    ids = encoded.inputs["input_ids"]
    text = encoder.processor.tokenizer.decode(ids[ids != encoder.image_token_id], skip_special_tokens=False)
    return _TILE.findall(text)


def require_same_tiles(
    ours: Encoded, theirs: Encoded, student: SampleEncoder, teacher: SampleEncoder
) -> None:
    """Refuse a sample whose pictures have other tiles for the teacher than for the student: the switched path
    puts what V_S says of a tile where the teacher's text has the same one.

    Both round a picture's size to whole tiles, and tiles of two sizes round in other ways now and then.

    Args:
        ours, theirs: the sample as student and teacher read it.

    Raises:
        BadSample: they differ.
    """
    found, expected = tiles_of(ours, student), tiles_of(theirs, teacher)
    if found != expected:
        raise BadSample(
            "the sample's pictures have other tiles for the teacher than for the student",
            where=f"sample {ours.key!r}",
            expected=_shown(expected) + ", as the teacher's processor cuts them",
            found=_shown(found),
            fix="--on-error skip leaves such samples out; where all are like this, give the student's image "
            f"processor as many tiles along the longest edge as the teacher's has, or {WITHOUT_SWITCH}",
        )


def tiles_row(
    teacher: ModelFiles, student: ModelFiles, pairs: list[tuple[Encoded, Encoded]], on_error: str
) -> Row:
    """Whether the samples that were looked at have the same tiles on both sides.

    Args:
        pairs: samples as teacher and student read them.
        on_error: whether one that has not stops a run, or is left out of it.
    """
    counts = []
    for theirs, ours in pairs:
        try:
            require_same_tiles(ours, theirs, student.encoder, teacher.encoder)
        except CachekdError as error:
            row = Row.refused("tiles", error)
            return row if on_error != "skip" else Row("tiles", "note", f"{error.where}: {row.text}", row.fix)
        counts.append(str(len(tiles_of(ours, student.encoder))))
    return Row("tiles", "ok", f"{', '.join(counts)} a sample, the same on both sides")


def _shown(tiles: list[str]) -> str:
    return f"{len(tiles):,} tiles ({' '.join(tiles)})"
