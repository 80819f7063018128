"""Every reason why a pair would not do, in one look; no weights are read unless the split is to be proven."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cachekd.data_options import Data, DataOptions
from cachekd.pair.preview import Run, preview
from cachekd.pair.rows import (
    Row,
    Side,
    answers_row,
    cache_rows,
    encoding_row,
    image_tokens_row,
    pixels_row,
    split_row,
    switch_rows,
    template_row,
    vocabulary_row,
)
from cachekd.pair.size import Sizes, sizes_of
from cachekd.samples import open_samples
from cachekd.vlm import default_device, default_dtype


@dataclass(frozen=True)
class PairReport:
    """All rows, and what a person would want to look at.

    Attributes:
        previews: key and the tokens of the first samples, as the student reads them.
    """

    rows: list[Row]
    sizes: Sizes
    previews: list[tuple[str, list[Run]]] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether nothing was refused."""
        return all(row.state != "refused" for row in self.rows)


def check_pair(
    teacher: str,
    student: str,
    data: Data,
    *,
    cache: str | Path | None = None,
    samples: int = 2,
    forward: bool = False,
    switch_bridge: Literal["linear"] | None = None,
) -> PairReport:
    """Look at everything that has to fit; what does not is a row, not an error.

    Args:
        teacher, student: model folders or hub names.
        data: as for a dump.
        cache: checked too where it is given; a folder or an address.
        samples: how many are looked at.
        forward: load both models and prove that each, taken apart, says what it says whole.
        switch_bridge: as for training.

    Raises:
        CachekdError: a model, a processor or the data set cannot be read at all.
    """
    theirs, ours = Side.open(teacher), Side.open(student)
    data = DataOptions.of(data)
    opened = open_samples(data)
    some = [opened[index] for index in range(min(samples, len(opened)))]
    pairs = [(theirs.encoder(sample), ours.encoder(sample)) for sample in some]
    rows = [
        vocabulary_row(theirs, ours),
        template_row(theirs, ours),
        encoding_row(theirs, ours),
        answers_row(pairs),
        image_tokens_row(theirs, ours, pairs),
        pixels_row(theirs, ours, pairs),
        *switch_rows(theirs, ours, switch_bridge),
    ]
    if cache is not None:
        rows += cache_rows(cache, opened, data, ours, teacher, pairs)
    if forward:
        with_image = next((pair for pair in pairs if "pixel_values" in pair[0].inputs), pairs[0])
        rows += [split_row("teacher", theirs, with_image[0]), split_row("student", ours, with_image[1])]
    sizes = sizes_of(theirs.config, ours.config, teacher_dtype=default_dtype(default_device()))
    shown = [
        (encoded.key, preview(encoded, ours.processor.tokenizer, ours.image_token_id)) for _, encoded in pairs
    ]
    return PairReport(rows, sizes, shown)
