"""What has to fit of a teacher, a student and a data set: a row for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from cachekd.cache import LogitCache
from cachekd.check.match import check_sample, check_samples, check_teacher, cut_alike
from cachekd.check.text import check_text
from cachekd.config import DataOptions
from cachekd.data import Encoded, Samples, collate
from cachekd.data.collate import ModelInputs
from cachekd.errors import CachekdError
from cachekd.losses.terms import WITHOUT_SWITCH
from cachekd.models import (
    ModelFiles,
    check_switch,
    check_tokenizers,
    default_device,
    default_dtype,
    generation_stops,
    plan_bridge,
    prove_split,
)
from cachekd.models.compat import switch_differences
from cachekd.models.families import family_of
from cachekd.models.fingerprint import encoding_fingerprint, template_fingerprint

State = Literal["ok", "note", "refused"]
PROBE = "Two cats, 3.14 % of a naïve café: 猫が二匹。\n\t<b>def f(x):</b> return x**2  🙂"


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        state: ok; note, where something differs that training can live with; refused, where it cannot.
        found: what is there.
        fix: what to do; None where it is ok.
        problem, where, expected: of a row that is refused, what `CachekdError` says beside these two.
    """

    name: str
    state: State
    found: str
    fix: str | None = None
    problem: str | None = None
    where: str | None = None
    expected: str | None = None

    @classmethod
    def refused(cls, name: str, error: CachekdError) -> Row:
        """What an error says, as a row."""
        where, expected, found, fix = (
            None if value is None else str(value)
            for value in (error.where, error.expected, error.found, error.fix)
        )
        return cls(name, "refused", found or "", fix, error.problem, where, expected)

    @classmethod
    def of(cls, name: str, check: Callable[[], object]) -> Row:
        """Run a check that raises what does not fit, and say how it went."""
        try:
            check()
        except CachekdError as error:
            return cls.refused(name, error)
        return cls(name, "ok", "matches")

    @property
    def text(self) -> str:
        """What was found, in whole."""
        return "; ".join(text for text in (self.problem, self.found) if text)

    @property
    def error(self) -> CachekdError:
        """A refused row, as those say it who look no further."""
        return CachekdError(
            self.problem or f"{self.name} does not fit",
            where=self.where,
            expected=self.expected,
            found=self.found or None,
            fix=self.fix,
        )


def require(rows: Iterable[Row]) -> None:
    """What `cachekd check` shows in whole, as training and pipelines take it.

    Args:
        rows: what takes longest last; those behind a refusal are not computed.

    Raises:
        CachekdError: the first row that is refused.
    """
    for row in rows:
        if row.state == "refused":
            raise row.error


def vocabulary_row(teacher: ModelFiles, student: ModelFiles) -> Row:
    """Whether both have the same tokens with the same ids; embeddings may have more rows on either side."""
    ours, theirs = student.processor.tokenizer, teacher.processor.tokenizer
    row = Row.of("vocabulary", partial(check_tokenizers, theirs, ours))
    if row.state == "refused":
        probe = [tokenizer(PROBE, add_special_tokens=False)["input_ids"] for tokenizer in (theirs, ours)]
        same = "a probe text has the same ids" if probe[0] == probe[1] else "a probe text has other ids"
        return replace(row, found=f"{row.found}; {same}")
    rows = [side.config.get_text_config().vocab_size for side in (teacher, student)]
    found = f"{len(ours):,} tokens on both sides"
    if rows[0] != rows[1]:
        found += f"; embeddings of {rows[0]:,} and {rows[1]:,} rows, those beyond the tokens are left out"
    return replace(row, found=found)


def end_of_turn_row(student: ModelFiles) -> Row:
    """Whether generation stops where the template ends a turn."""
    name, token = "end of turn", student.encoder.end_of_turn
    if token is None:
        fix = "write an end-of-turn token behind each answer in the chat template"
        return Row(name, "note", "the chat template writes none: a student does not learn where to stop", fix)
    tokenizer, stops = student.processor.tokenizer, generation_stops(student.path, student.config)
    said = repr(tokenizer.convert_ids_to_tokens(token))
    others = [tokenizer.convert_ids_to_tokens(stop) for stop in stops if stop != token]
    if token in stops and tokenizer.eos_token_id == token:
        return Row(name, "ok", f"the template's {said} is the tokenizer's EOS, and generation stops at it")
    found = f"the template's is {said}, the tokenizer's EOS {tokenizer.eos_token!r}"
    if token in stops:
        return Row(name, "ok", f"{found}; generation stops at the template's")
    shown = ", ".join(map(repr, others)) or "nothing"
    fix = "nothing: the trained student is saved with a generation_config.json that has both"
    return Row(name, "note", f"{found}; generation stops at {shown}", fix)


def template_row(teacher: ModelFiles, student: ModelFiles) -> Row:
    """Whether both have the same chat template; else every answer stands elsewhere."""
    theirs, ours = (template_fingerprint(side.encoder.template) for side in (teacher, student))
    if theirs == ours:
        return Row("chat template", "ok", "the same text")
    fix = "save the teacher's chat_template.jinja beside the student's processor"
    problem = "teacher and student have different chat templates"
    return _other_text("chat template", problem, (teacher, student), (theirs, ours), fix)


def encoding_row(teacher: ModelFiles, student: ModelFiles) -> Row:
    """Whether the same text has the same tokens: a BOS token, for one, may be missing on one side."""
    theirs, ours = (encoding_fingerprint(side.encoder) for side in (teacher, student))
    if theirs is None or ours is None:
        whose = " and ".join(
            name for name, found in (("teacher", theirs), ("student", ours)) if found is None
        )
        return Row("encoding", "note", f"the {whose}'s processor takes no text without images", "nothing")
    if theirs == ours:
        return Row("encoding", "ok", "a probe text has the same tokens, and the same are supervised")
    fix = "the same tokenizer, chat template and kind of processor for both"
    problem = "teacher and student encode a probe text in different ways"
    return _other_text("encoding", problem, (teacher, student), (theirs, ours), fix)


def _other_text(
    name: str, problem: str, sides: tuple[ModelFiles, ModelFiles], hashes: tuple[str, str], fix: str
) -> Row:
    expected, found = (f"sha256 {each}" for each in hashes)
    where = " and ".join(side.path for side in sides)
    return Row(name, "refused", found, fix, problem=problem, where=where, expected=expected)


def switch_rows(teacher: ModelFiles, student: ModelFiles, bridge: str | None = None) -> list[Row]:
    """What lies between the student's features and the teacher's projector."""
    if bridge is not None:
        return [_bridge_row(teacher, student)]
    own_text = teacher.reads_otherwise(student)
    check = partial(check_switch, teacher.config, student.config, own_text=own_text)
    if teacher.image_token_id is None:
        return [Row.of("switch", check)]
    differences = switch_differences(teacher.config, student.config, own_text=own_text)
    if not differences:
        width = getattr(student.config.vision_config, family_of(student.config).width)
        return [Row("switch", "ok", f"the same family, layer and grid; features of width {width:,}")]
    fix = f"a student with the teacher's kind of vision encoder, or {WITHOUT_SWITCH}"
    if _bridge_row(teacher, student).state != "refused":
        fix = f"--switch-bridge linear (beyond the paper); or {fix}"
    settings = frozenset(difference.setting for difference in differences)
    rows = []
    for difference in differences:
        others = settings - {difference.setting}
        row = Row.of(f"switch: {difference.name}", partial(check, bridged=others))
        rows.append(replace(row, fix=fix))
    return rows


def _bridge_row(teacher: ModelFiles, student: ModelFiles) -> Row:
    try:
        own_text = teacher.reads_otherwise(student)
        plan = plan_bridge(teacher.config, student.config, own_text=own_text)
    except CachekdError as error:
        return Row.refused("switch bridge", error)
    fix = "nothing to do if this is intended; a student with the teacher's width and grid needs no bridge"
    return Row("switch bridge", "note", f"trained, beyond the paper: {plan}", fix)


def cache_rows(
    cache: LogitCache,
    samples: Samples,
    data: DataOptions,
    student: ModelFiles,
    teacher: ModelFiles,
    pairs: list[tuple[Encoded, Encoded]],
    *,
    across: bool = False,
) -> list[Row]:
    """Compare a cache with data, student and teacher.

    Args:
        across: teacher and student read text in other ways: the cache is of what the teacher reads.
    """
    known = [theirs if across else ours for theirs, ours in pairs if ours.key in cache]
    notes: list[Row] = []  # samples that are missing for a reason

    def same_samples() -> None:
        for encoded in known:
            ours, theirs = encoded, cache[encoded.key]
            if "cut" in {source.data.too_long for source in cache.manifest.sources}:
                ours, theirs = cut_alike(ours, theirs)
            check_sample(cache, ours, theirs)

    def same_inputs() -> None:
        if across:
            check_text(cache, teacher, "teacher's")
        else:
            check_text(cache, student)
        lacking = check_samples(cache, samples, data=data, missing="skip")
        if lacking.others:
            raise lacking.error(cache, samples)
        if len(lacking):
            causes = "; ".join([f"{len(lacking):,} of {len(samples):,} samples", *lacking.causes()])
            notes.append(Row("cache: lacks", "note", causes, "train with --missing skip"))

    return [
        Row.of("cache: inputs and keys", same_inputs),
        Row.of("cache: samples", same_samples),
        cache_teacher_row(cache, teacher),
        *notes,
    ]


def cache_teacher_row(cache: LogitCache, teacher: ModelFiles) -> Row:
    """Whether the teacher that runs the switched path is the cache's; all its weights may be read."""
    return Row.of("cache: teacher", partial(check_teacher, cache, teacher))


def split_row(name: str, side: ModelFiles, encoded: Encoded) -> Row:
    """Vision encoder, projector and language model one after the other, against the model's own forward."""
    name = f"{name}'s split"
    if side.image_token_id is None or "pixel_values" not in encoded.inputs:
        return Row(name, "note", "no image in the sample to take it apart with")
    device = default_device()
    model = side.load(dtype=default_dtype(device), device=device)
    batch = ModelInputs.of(collate([encoded], side.encoder.pad_token_id)).to(device)
    try:
        miss = prove_split(model, batch.tensors, batch.positions)
    except CachekdError as error:
        return Row.refused(name, error)
    if miss == 0:
        tokens = len(batch.token_ids)
        return Row(name, "ok", f"equals the whole forward at {tokens} tokens, bit by bit")
    return Row(name, "note", f"off by {miss:.1%} of the logits' deviation, as rounding may be", "nothing")
