"""What is proposed for a pair: which terms, which settings on each card, and what it will take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cachekd.check.sizes import parameters_of
from cachekd.config import DataOptions
from cachekd.data import open_samples
from cachekd.errors import CachekdError
from cachekd.models import ModelFiles
from cachekd.paths import split_query
from cachekd.presets.cards import CARDS, Chooser, Chosen
from cachekd.presets.cost import TFLOPS, Cost, Parts, cost_of
from cachekd.presets.fit import Fit, fit_of
from cachekd.presets.pairs import Pair
from cachekd.presets.published import Published
from cachekd.presets.sample import Assumed, Read, read_by


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        name: that the pipeline calls it by: a folder, or a name on the hub.
        config: its configuration.
        image_processor: None for a language model.
        unverified: settings of a published shape that no source was found for.
    """

    name: str
    config: Any
    image_processor: Any | None
    unverified: tuple[str, ...] = ()

    @cached_property
    def parameters(self) -> Parts:
        """By part."""
        return parameters_of(self.config)

    @property
    def size(self) -> str:
        """How many parameters it has in all, for people."""
        count = sum(self.parameters.values())
        if count < 10**8:
            return f"{count / 1e6:.2g} million parameters"
        return f"{count / 1e9:.2f} billion parameters"


@dataclass(frozen=True)
class Proposal:
    """All of it.

    Attributes:
        pair: the preset; None where two models were named.
        teacher, student: the models.
        fit: which terms are on, and why.
        theirs, ours: the sample that was made up, as either reads it.
        assumed: what that sample is.
        chosen: by card.
        card: the one to write for.
        cost: on that card.
        data, test_data: where the data are; None: what the file calls them until somebody says it.
    """

    pair: Pair | None
    teacher: Side
    student: Side
    fit: Fit
    theirs: Read
    ours: Read
    assumed: Assumed
    chosen: dict[int, Chosen]
    card: int
    cost: Cost
    data: str | None
    test_data: str | None

    @property
    def here(self) -> Chosen:
        """What is set for the card."""
        return self.chosen[self.card]

    @property
    def why(self) -> str:
        """Of how L_VSD fits."""
        return self.fit.why if self.pair is None else self.pair.why

    def losses(self) -> dict[str, Any]:
        """Settings of the terms that follow from what fits."""
        said: dict[str, Any] = {}
        if self.fit.switch == "none":
            said["lambda_vsd"] = 0.0
        if self.fit.switch == "linear":
            said["switch_bridge"] = "linear"
        if self.fit.own_text:
            said["align_vocabulary"] = "cells"
        return said


def of_preset(pair: Pair) -> tuple[Side, Side, bool]:
    """Teacher and student by their published shapes, and whether they read text in two ways."""
    found = [Published(name) for name in (pair.teacher, pair.student)]
    folders = pair.folders or tuple(one.hub for one in found)
    teacher, student = (
        Side(folder, one.config, one.image_processor, tuple(one.unverified))
        for folder, one in zip(folders, found, strict=True)
    )
    return teacher, student, pair.tokenizers == "two"


def of_models(teacher: str, student: str) -> tuple[Side, Side, bool]:
    """The same of two models that are there.

    Raises:
        CachekdError: a model or its processor cannot be read, or its family is not supported.
    """
    theirs, ours = ModelFiles(teacher), ModelFiles(student)
    first, second = (Side(one.path, one.config, one.processor.image_processor) for one in (theirs, ours))
    return first, second, theirs.reads_otherwise(ours)


def count_of(data: str | None) -> int | None:
    """How many samples there are; None where they are not on this disk.

    Raises:
        CachekdError: they are, and cannot be read.
    """
    if data is None or not (options := DataOptions(data=data)).is_local:
        return None
    try:
        return len(open_samples(options))
    except CachekdError:
        if Path(split_query(data)[0]).exists():
            raise
        return None  # not there yet: a file, or any that match a pattern


def propose(
    teacher: Side,
    student: Side,
    *,
    own_text: bool,
    card: int,
    assumed: Assumed,
    tflops: float | None = None,
    pair: Pair | None = None,
    data: str | None = None,
    test_data: str | None = None,
    cards: tuple[int, ...] = CARDS,
    progress: Callable[[str], None] = lambda what: None,
) -> Proposal:
    """Find out what fits, and how to train it.

    Args:
        own_text: whether the two read text in two ways.
        card: GB of the card to write for.
        tflops: sustained; by default what `TFLOPS` says of the card.
        cards: for which settings are found.
        progress: is told what is being looked at.
    """
    progress("the vision sides")
    fit = fit_of(teacher.config, student.config, own_text=own_text)
    theirs, ours = (read_by(side.config, side.image_processor, assumed) for side in (teacher, student))
    switched = fit.switch != "none" and theirs.image_tokens > 0
    chooser = Chooser(teacher.config, student.config, ours.encoded, theirs.encoded, switched=switched)
    chosen = {}
    for each in cards:
        progress(f"a training step on {each} GB")
        chosen[each] = chooser.choose(each)
    cost = cost_of(
        teacher.parameters,
        student.parameters,
        theirs,
        ours,
        assumed,
        switched=switched,
        recomputed=chosen[card].train["gradient_checkpointing"],
        tflops=tflops or TFLOPS[card],
    )
    return Proposal(pair, teacher, student, fit, theirs, ours, assumed, chosen, card, cost, data, test_data)
