"""Do a teacher, a student and a data set fit? Every row, the sizes, and a few steps of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from cachekd.check.across import Across, as_note, token_bytes_row, unknown_bytes_row
from cachekd.check.bind import open_bound
from cachekd.check.data import RunModels
from cachekd.check.data_rows import (
    Counts,
    Lengths,
    answers_row,
    bad_rows,
    counts_of,
    data_row,
    embedding_rows_row,
    image_tokens_row,
    length_row,
    lengths_of,
    pixels_row,
)
from cachekd.check.rows import (
    Row,
    cache_rows,
    encoding_row,
    end_of_turn_row,
    split_row,
    switch_rows,
    template_row,
    vocabulary_row,
)
from cachekd.check.sizes import Sizes, StepSizes, sizes_of, step_sizes
from cachekd.check.tiles import tiles_row
from cachekd.config import CheckConfig, DataOptions
from cachekd.data import Encoded, Limits, Samples, open_samples, survey
from cachekd.data.left_out import attempts
from cachekd.data.sample import Subset
from cachekd.errors import BadSample, CachekdError
from cachekd.losses.terms import WITHOUT_SWITCH
from cachekd.models import (
    ModelFiles,
    default_device,
    default_dtype,
    limits_of,
)
from cachekd.paths import is_url

Kind = Literal["image", "context", "supervised"]


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind.

    Attributes:
        kind: an image's tokens, what the model is told, or what it is to say.
        tokens: how many.
        text: decoded with special tokens; for an image its token once.
    """

    kind: Kind
    tokens: int
    text: str


def preview(encoded: Encoded, tokenizer: Any, image_token_id: int | None) -> list[Run]:
    """The tokens of a sample in runs, from first to last.

    Args:
        image_token_id: the placeholder that an image is many of; None for a language model.
    """
    ids = encoded.inputs["input_ids"].tolist()
    kinds: list[Kind] = [
        "image" if token == image_token_id else "supervised" if supervised else "context"
        for token, supervised in zip(ids, encoded.supervised.tolist(), strict=True)
    ]
    runs = []
    for kind, group in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        shown = tokens[:1] if kind == "image" else tokens
        runs.append(Run(kind, len(tokens), tokenizer.decode(shown, skip_special_tokens=False)))
    return runs


_SHOWN = 16  # bad samples, a row each
FAR_SAMPLES = 256  # that are looked at where every record costs much


@dataclass(frozen=True)
class PairReport:
    """All rows, and what a person would want to look at.

    Attributes:
        data: how many samples there are, with and without images.
        step: what a training step would hold; None where that cannot be computed.
        lengths: of the data set's samples, as the model reads them that makes more tokens of an image; None
            where no record can be read.
        previews: key and the tokens of the first samples, as the student reads them.
        across: what can be aligned; None where both sides have the same tokens, or it is not known.
    """

    rows: list[Row]
    sizes: Sizes
    data: Counts
    lengths: Lengths | None = None
    step: StepSizes | None = None
    previews: list[tuple[str, list[Run]]] = field(default_factory=list)
    across: Across | None = None

    @property
    def fits(self) -> bool:
        """Whether nothing was refused."""
        return all(row.state != "refused" for row in self.rows)


def check_pair(config: CheckConfig) -> PairReport:
    """Look at everything that has to fit; what does not is a row, not an error.

    Raises:
        CachekdError: a model, a processor or the data set cannot be read at all.
    """
    theirs, ours = ModelFiles(config.teacher), ModelFiles(config.student)
    opened = open_samples(config)
    limits = limits_of([theirs.config, ours.config], max_tokens=config.max_tokens, too_long=config.too_long)
    pairs, bad = _first_pairs(opened, theirs, ours, config.samples)
    near = Subset(opened, limit=FAR_SAMPLES, shuffle_seed=0) if _is_costly(config) else opened
    take_images = None not in (theirs.image_token_id, ours.image_token_id)
    theirs_are_longer = sum(len(a) - len(b) for a, b in pairs) > 0
    seen = survey(near, (theirs if theirs_are_longer else ours).encoder)
    counts, lengths = counts_of(seen, opened), lengths_of(seen, limits)
    otherwise, across = theirs.reads_otherwise(ours), None
    vocabulary = vocabulary_row(theirs, ours)
    answers = [] if otherwise else [answers_row(pairs)]
    if otherwise:
        try:
            across = Across.of(theirs, ours, near, pairs)
            vocabulary, answers = across.vocabulary_row(vocabulary), across.answers_rows()
        except CachekdError as error:
            vocabulary = unknown_bytes_row(error)
    rows = [
        vocabulary,
        *_embedding_rows(limits, theirs, ours, pairs, across=otherwise),
        as_note(template_row(theirs, ours), vocabulary),
        end_of_turn_row(ours),
        as_note(encoding_row(theirs, ours), vocabulary),
        data_row(counts, opened.notes, takes_images=take_images),
        *bad_rows(bad[:_SHOWN], config.on_error),
        length_row(lengths, config),
        *answers,
        image_tokens_row(theirs, ours, pairs),
        pixels_row(theirs, ours, pairs),
    ]
    plan = None
    if take_images or config.switch_bridge is not None:
        rows += (switched := switch_rows(theirs, ours, config.switch_bridge))
        if config.switch_bridge is not None and all(row.state != "refused" for row in switched):
            plan = RunModels(ours, theirs).bridge_plan()
            rows += [tiles_row(theirs, ours, pairs, config.on_error)] if plan.tiles else []
    else:
        rows.append(Row("switch", "note", "no vision encoder", WITHOUT_SWITCH))
    if config.cache is not None:
        cache = open_bound(config.cache)
        rows += cache_rows(cache, opened, config, ours, theirs, pairs, across=otherwise)
        rows += [] if across is None else [token_bytes_row(cache, theirs)]
    if config.forward:
        with_image = next((pair for pair in pairs if "pixel_values" in pair[0].inputs), pairs[0])
        rows += [split_row("teacher", theirs, with_image[0]), split_row("student", ours, with_image[1])]
    sizes = sizes_of(theirs.config, ours.config, teacher_dtype=default_dtype(default_device()))
    shown = [
        (encoded.key, preview(encoded, ours.processor.tokenizer, ours.image_token_id)) for _, encoded in pairs
    ]
    own_text = otherwise or (plan is not None and plan.other_text)
    step = None
    try:
        step = step_sizes(theirs, ours, pairs, own_text=own_text, run=config.run)
    except CachekdError as error:  # adapters that peft refuses
        rows.append(Row.refused("training step", error))
    return PairReport(rows, sizes, counts, lengths, step, shown, across)


def _embedding_rows(
    limits: Limits,
    teacher: ModelFiles,
    student: ModelFiles,
    pairs: list[tuple[Encoded, Encoded]],
    *,
    across: bool,
) -> list[Row]:
    """Where both have the same tokens, one row for both models' embeddings; else each has its own tokens."""
    theirs, ours = ([pair[side] for pair in pairs] for side in (0, 1))
    if not across:
        return [embedding_rows_row(limits, teacher, theirs)]
    return [
        embedding_rows_row(limits_of([side.config]), side, read, f"{whose} embedding rows")
        for whose, side, read in (("teacher's", teacher, theirs), ("student's", student, ours))
    ]


def _is_costly(data: DataOptions) -> bool:
    """Whether a record takes a request, or a map function gets all of a sample's images with it."""
    return is_url(data.data) or (data.map is not None and not data.data.endswith((".json", ".jsonl")))


def _first_pairs(
    samples: Samples, teacher: ModelFiles, student: ModelFiles, count: int
) -> tuple[list[tuple[Encoded, Encoded]], list[BadSample]]:
    """The first samples that can be used, as either side reads them, and those before that cannot.

    Raises:
        BadSample: none of the first many can be.
    """

    def read(index: int) -> tuple[Encoded, Encoded]:
        sample = samples[index]
        return teacher.encoder(sample), student.encoder(sample)

    pairs, bad = [], []
    for _, found in attempts(len(samples), read, "skip"):
        if isinstance(found, BadSample):
            bad.append(found)
        else:
            pairs.append(found)
        if len(pairs) == count:
            break
    if not pairs:
        raise bad[0]
    return pairs, bad
