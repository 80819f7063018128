"""What the scores say: a section for every set of questions, and one sentence for the newest."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cachekd.errors import CachekdError
from cachekd.evaluate import Difference, Evaluation, QuestionSet, Score, differences
from cachekd.report.runs import Run


@dataclass(frozen=True)
class Row:
    """A line of the tables, and a bar.

    Attributes:
        color: a name in the style sheet.
        blind: whether the pictures were taken away.
        agrees: whether its agreement is with the teacher that the section shows.
    """

    name: str
    score: Score
    color: str
    blind: bool = False
    agrees: bool = True


@dataclass(frozen=True)
class Section:
    """One set of questions.

    Attributes:
        differences: of the run; of the baselines from themselves without pictures, and from the prior.
        notes: what a reader has to know of it, in sentences.
    """

    title: str
    asked: QuestionSet
    rows: list[Row]
    differences: list[Difference]
    of_baselines: list[Difference]
    notes: list[str] = field(default_factory=list)

    @property
    def types(self) -> list[tuple[str, int, list[float | None]]]:
        """Each type of question, the most frequent first: how many, and each row's share of right answers."""
        counted = sorted(self.asked.types.items(), key=lambda item: -item[1])
        return [(kind, n, [row.score.by_type.get(kind) for row in self.rows]) for kind, n in counted]


def sections(runs: Sequence[Run]) -> list[Section]:
    """Make a section of each set of questions that the first run was asked, the newest first.

    Raises:
        CachekdError: a baseline was scored, but on other questions than the run: the two would be compared.
    """
    _refuse_other_questions(*runs)
    return [_section(own, runs) for own in runs[0].evaluations]


def verdict(runs: Sequence[Run], found: Sequence[Section]) -> str:
    """What came of it, in a few sentences from the numbers of the newest set, whichever way they go."""
    run = runs[0]
    if not found:
        if run.benchmarks:
            return f"{run.name} was asked public benchmarks alone: their scores are below."
        return f"{run.name} has not been evaluated: run cachekd eval on it."
    newest = found[0]
    scores = {row.name: row.score.exact_match for row in newest.rows}
    words = [
        f"{run.name} answers {100 * scores[run.name]:.1f} % of the questions exactly "
        f"({newest.asked.questions:,} of {newest.asked.data})"
    ]
    for each in newest.differences:
        if each.against == "teacher":
            words.append(
                f"{_points(each)} against its teacher's {100 * scores['teacher']:.1f} % ({_sure(each)})"
            )
        elif each.against in {other.name for other in runs[1:]}:
            words.append(f"{_points(each)} against {each.against} ({_sure(each)})")
    said = ", ".join(words) + "."
    if len(words) > 1:
        said += " In brackets: 95 % intervals; where zero is within, the difference may be chance."
    others = [
        (f"{run.name}, blind", "Without pictures it answers"),
        ("prior", "The most frequent answers give"),
    ]
    worth = [f" {what} {100 * scores[name]:.1f} %." for name, what in others if name in scores]
    return said + "".join(worth)


def difference_text(difference: Difference) -> str:
    """Write a difference in points, with the 95 % interval."""
    return f"{_points(difference)} ({_interval(difference)})"


def _points(difference: Difference) -> str:
    return f"{_rounded(difference.difference):+.1f} points"


def _sure(difference: Difference) -> str:
    chance = "more than chance" if difference.sure else "may be chance"
    return f"{_interval(difference)}, {chance}"


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return "too few samples for an interval"
    return f"{_rounded(difference.low):.1f} to {_rounded(difference.high):.1f}"


def _rounded(share: float) -> float:
    return round(100 * share, 1) + 0.0  # no -0.0


def _section(own: Evaluation, runs: Sequence[Run]) -> Section:
    run, asked = runs[0], own.asked
    found = [(one, scores) for one in runs if (scores := one.scores_on(asked.fingerprint)) is not None]
    teacher = next((scores.teacher for _, scores in found if scores.teacher), None)
    prior = next((scores.prior for _, scores in found if scores.prior), None)
    rows = [Row("teacher", teacher, "teacher")] if teacher else []
    for one, scores in found:
        rows += _rows_of(one, scores, teacher)
    rows += [Row("prior", prior, "prior")] if prior else []
    compared = _differences(rows, runs, asked.per_sample)
    return Section(
        title=f"Accuracy on {asked.data} ({asked.questions:,} questions, {len(asked.per_sample):,} samples)",
        asked=asked,
        rows=rows,
        differences=[each for each in compared if each.row == run.name],
        of_baselines=[each for each in compared if each.row != run.name],
        notes=[
            *_what_rows_are(rows),
            *_over_cells(rows),
            *_of_the_data(own, run),
            *_of_baselines(runs, found, teacher),
        ],
    )


def _rows_of(run: Run, scores: Evaluation, teacher: Score | None) -> Iterator[Row]:
    [score] = scores.models
    agrees = teacher is None or score.agrees_with in (None, teacher.name)
    yield Row(run.name, score, run.color, agrees=agrees)
    if score.blind is not None:
        yield Row(f"{run.name}, blind", score.blind, run.color, blind=True)


def _differences(rows: list[Row], runs: Sequence[Run], per_sample: list[int]) -> list[Difference]:
    """The run from everything else; each baseline from itself without pictures, and from the prior."""
    scores = {row.name: row.score for row in rows}
    run, *baselines = (one.name for one in runs)
    pairs = [(run, other) for other in [*baselines, "teacher", f"{run}, blind", "prior"]]
    pairs += [(one, other) for one in baselines for other in (f"{one}, blind", "prior")]
    there = [pair for pair in pairs if scores.keys() >= set(pair)]
    named = [((ours, scores[ours]), (theirs, scores[theirs])) for ours, theirs in there]
    return differences(named, per_sample)


def _what_rows_are(rows: list[Row]) -> Iterator[str]:
    of = {row.name: row.score.name for row in rows}
    if "teacher" in of:
        yield f"The teacher is {of['teacher']}."
    if any(row.blind for row in rows):
        yield "Blind: the same model and questions, with every picture replaced by its mean colour."
    if "prior" in of:
        yield f"Prior: the most frequent answer to the same question, or else to its type, in {of['prior']}."


def _over_cells(rows: list[Row]) -> Iterator[str]:
    """Of which rows agreement and KL are of other things than of the rest."""
    for row in rows:
        if (cells := row.score.over_cells) is None or not row.agrees:
            continue
        left_out = f"; {cells.differing:,} answers have other bytes for it" if cells.differing else ""
        yield (
            f"{row.name} writes the answers in other tokens than its teacher. Its agreement and KL are "
            f"{cells}{left_out}: they are not to be compared with those of a model with another tokenizer."
        )


def _of_the_data(own: Evaluation, run: Run) -> Iterator[str]:
    asked = own.asked
    namesakes = [
        other.asked for other in run.evaluations if other.asked.data == asked.data and other is not own
    ]
    if namesakes:
        others = " and ".join(map(_told, namesakes))
        yield (
            f"This is {_told(asked)}. Scores on {others} are of other questions, though the data has the "
            "same name: they are not to be compared."
        )
    if asked.history != "none":
        yield "Each question was asked after the conversation before it."
    if asked.left_out.samples:
        yield f"{asked.left_out.samples:,} samples were left out: they cannot be used, or are too long."
    if asked.unasked_answers:
        yield f"{asked.unasked_answers:,} answers follow no question: nothing asks for them."


def _of_baselines(
    runs: Sequence[Run], found: list[tuple[Run, Evaluation]], teacher: Score | None
) -> Iterator[str]:
    scored = {one.name for one, _ in found}
    never = [one.name for one in runs if not one.evaluations]
    others = [one.name for one in runs if one.evaluations and one.name not in scored]
    if never:
        yield f"Not evaluated yet (cachekd eval does it): {', '.join(never)}."
    if others:
        yield f"Not asked these questions: {', '.join(others)}."
    for one, scores in found:
        other = scores.models[0].agrees_with
        if teacher and other not in (None, teacher.name):
            yield f"{one.name} was compared with another teacher, {other}: not shown here."


def _told(asked: QuestionSet) -> str:
    history = "" if asked.history == "none" else f", history {asked.history}"
    return f"{asked.data} ({asked.questions:,} questions, {asked.fingerprint[:8]}{history})"


def _refuse_other_questions(run: Run, *baselines: Run) -> None:
    known = {one.asked.fingerprint for one in run.evaluations}
    others = [
        other
        for other in baselines
        if known and other.evaluations and not known & {one.asked.fingerprint for one in other.evaluations}
    ]
    if not others:
        return
    asked = run.evaluations[0].asked
    folders = [str(one.folder) for one in (run, *others)]
    history = [] if asked.history == "none" else ["--history", asked.history]
    raise CachekdError(
        "scores on different questions are not to be compared",
        where=" and ".join(folders),
        expected=f"scores on the questions of {run.name}: {_sets_of(run)}",
        found="; ".join(f"{other.name} was asked {_sets_of(other)}" for other in others),
        fix=shlex.join(["cachekd", "eval", *folders, "--data", asked.data, *history]),
    )


def _sets_of(run: Run) -> str:
    return ", ".join(_told(one.asked) for one in run.evaluations)
