"""What has to fit of a teacher, a student and a data set: a row for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from cachekd.bind import open_bound
from cachekd.data_options import DataOptions
from cachekd.errors import BadSample, CachekdError
from cachekd.fingerprint import encoding_fingerprint, image_processor_fingerprint, template_fingerprint
from cachekd.matching import check_cache, check_sample, check_teacher, cut_alike
from cachekd.samples import Encoded, Limits, SampleEncoder, Samples, collate, predicting_positions
from cachekd.samples.limits import NO_ROW
from cachekd.vlm import (
    decode,
    default_device,
    default_dtype,
    encode,
    generation_stops,
    load_config,
    load_model,
    load_processor,
    logits_at,
    plan_bridge,
    project,
)
from cachekd.vlm.compat import switch_differences, tokenizer_difference
from cachekd.vlm.families import TEXT_ONLY, family_of

State = Literal["ok", "note", "refused"]
_ROUNDING = 0.05  # of the logits' deviation: what bfloat16 can do; a wrong split is off by more
PROBE = "Two cats, 3.14 % of a naïve café: 猫が二匹。\n\t<b>def f(x):</b> return x**2  🙂"


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        state: ok; note, where something differs that training can live with; refused, where it cannot.
        found: what is there.
        fix: what to do; None where it is ok.
    """

    name: str
    state: State
    found: str
    fix: str | None = None


@dataclass(frozen=True)
class Side:
    """A model's config, processor and encoder: the teacher's or the student's."""

    path: str
    config: Any
    processor: Any
    encoder: SampleEncoder

    @classmethod
    def open(cls, path: str) -> Side:
        """From a model's folder or hub name; no weights are read.

        Raises:
            CachekdError: config or processor cannot be read.
        """
        processor = load_processor(path)
        return cls(path, load_config(path), processor, SampleEncoder(processor))

    @property
    def image_token_id(self) -> int | None:
        """The placeholder's; None for a language model."""
        return None if family_of(self.config) is TEXT_ONLY else self.config.image_token_id


def vocabulary_row(teacher: Side, student: Side) -> Row:
    """The same tokens with the same ids; embeddings may have more rows on either side."""
    ours, theirs = student.processor.tokenizer, teacher.processor.tokenizer
    difference = tokenizer_difference(theirs, ours)
    if difference is not None:
        probe = [tokenizer(PROBE, add_special_tokens=False)["input_ids"] for tokenizer in (theirs, ours)]
        same = "a probe text has the same ids" if probe[0] == probe[1] else "a probe text has other ids"
        fix = "a student of the teacher's family, or with the teacher's tokenizer"
        return Row("vocabulary", "refused", f"{difference}; {same}", fix)
    rows = [side.config.get_text_config().vocab_size for side in (teacher, student)]
    found = f"{len(ours):,} tokens on both sides"
    if rows[0] != rows[1]:
        found += f"; embeddings of {rows[0]:,} and {rows[1]:,} rows, those beyond the tokens are left out"
    return Row("vocabulary", "ok", found)


def embedding_rows_row(limits: Limits, teacher: Side, pairs: list[tuple[Encoded, Encoded]]) -> Row:
    """Tokens that one of the models has no embedding for are refused where a sample has one."""
    name, rows, tokens = "embedding rows", limits.embedding_rows, len(teacher.processor.tokenizer)
    if rows is None or tokens <= rows:
        return Row(name, "ok", f"one for each of the {tokens:,} tokens")
    found = f"{rows:,} in {limits.embedding_rows_of} for {tokens:,} tokens: {tokens - rows:,} have none"
    for theirs, _ in pairs:
        ids = theirs.inputs["input_ids"]
        is_image = ids == (-1 if teacher.image_token_id is None else teacher.image_token_id)
        try:
            limits.require_rows(ids, is_image, teacher.processor.tokenizer, f"sample {theirs.key!r}")
        except BadSample as error:
            return Row(name, "refused", f"{found}; {error.where}: {error.problem}", NO_ROW)
    return Row(name, "note", f"{found}; a sample with such a token is refused", NO_ROW)


def end_of_turn_row(student: Side) -> Row:
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


def template_row(teacher: Side, student: Side) -> Row:
    """The same chat template, or every answer stands elsewhere."""
    theirs, ours = (template_fingerprint(side.encoder.template) for side in (teacher, student))
    if theirs == ours:
        return Row("chat template", "ok", "the same text")
    fix = "save the teacher's chat_template.jinja beside the student's processor"
    return Row("chat template", "refused", f"sha256 {theirs[:12]} and {ours[:12]}", fix)


def encoding_row(teacher: Side, student: Side) -> Row:
    """The same tokens for the same text: a BOS token, for one, may be missing on one side."""
    theirs, ours = (encoding_fingerprint(side.encoder) for side in (teacher, student))
    if theirs is None or ours is None:
        whose = " and ".join(
            name for name, found in (("teacher", theirs), ("student", ours)) if found is None
        )
        return Row("encoding", "note", f"the {whose}'s processor takes no text without images", "nothing")
    if theirs == ours:
        return Row("encoding", "ok", "a probe text has the same tokens, and the same are supervised")
    fix = "the same tokenizer, chat template and kind of processor for both"
    return Row("encoding", "refused", f"sha256 {theirs[:12]} and {ours[:12]} over a probe text's tokens", fix)


def bad_rows(bad: list[BadSample], on_error: str) -> list[Row]:
    """Samples among the first that cannot be used."""
    state: State = "note" if on_error == "skip" else "refused"
    return [
        Row("bad sample", state, f"{error.where}: {error.problem}; {error.found}", error.fix) for error in bad
    ]


def answers_row(pairs: list[tuple[Encoded, Encoded]]) -> Row:
    """The same answer tokens, wherever they stand."""
    for theirs, ours in pairs:
        if theirs.token_ids.tolist() != ours.token_ids.tolist():
            found = f"sample {ours.key!r}: {len(theirs.token_ids)} and {len(ours.token_ids)}, or other ids"
            return Row("answer tokens", "refused", found, "the same tokenizer and chat template for both")
    counts = ", ".join(str(len(ours.token_ids)) for _, ours in pairs)
    return Row("answer tokens", "ok", f"the same in {len(pairs)} sample(s): {counts}")


def image_tokens_row(teacher: Side, student: Side, pairs: list[tuple[Encoded, Encoded]]) -> Row:
    """How many places an image takes on each side; targets belong to answer tokens, so they may differ."""

    def count(side: Side, encoded: Encoded) -> int:
        return int((encoded.inputs["input_ids"] == side.image_token_id).sum()) if side.image_token_id else 0

    counts = [(count(teacher, theirs), count(student, ours)) for theirs, ours in pairs]
    found = ", ".join(str(ours) if theirs == ours else f"{theirs} and {ours}" for theirs, ours in counts)
    if all(theirs == ours for theirs, ours in counts):
        return Row("image tokens", "ok", f"{found} a sample, on both sides")
    return Row("image tokens", "note", f"{found} a sample", "L_Align does not mind; for L_VSD see the switch")


def pixels_row(teacher: Side, student: Side, pairs: list[tuple[Encoded, Encoded]]) -> Row:
    """Whether V_T and V_S see the same picture."""
    name = "image processing"
    if student.image_token_id is None or teacher.image_token_id is None:
        return Row(name, "note", "no vision encoder on one side or both", "--lambda-vsd 0")
    seen = [
        (theirs.inputs["pixel_values"], ours.inputs["pixel_values"])
        for theirs, ours in pairs
        if "pixel_values" in theirs.inputs and "pixel_values" in ours.inputs
    ]
    same = all(a.shape == b.shape and torch.equal(a, b) for a, b in seen)
    settings = [image_processor_fingerprint(side.processor) for side in (teacher, student)]
    if settings[0] == settings[1]:
        return Row(name, "ok", f"the same settings, {len(seen)} sample(s) with the same pixels")
    if seen and same:
        return Row(name, "ok", f"other settings, but the same pixels in {len(seen)} sample(s)")
    found = "other settings" + (
        f": pixels {tuple(seen[0][0].shape)} and {tuple(seen[0][1].shape)}" if seen else ""
    )
    fix = "nothing, if it is meant: the cache holds what the teacher saw, V_S gets the student's own pixels"
    return Row(name, "note", found, fix)


def switch_rows(teacher: Side, student: Side, bridge: str | None = None) -> list[Row]:
    """What lies between the student's features and the teacher's projector."""
    if bridge is not None:
        return [_bridge_row(teacher, student)]
    if teacher.image_token_id is None or student.image_token_id is None:
        return [Row("switch", "note", "no vision encoder", "--lambda-vsd 0: L_CE and L_Align")]
    differences = switch_differences(teacher.config, student.config)
    if not differences:
        width = getattr(student.config.vision_config, family_of(student.config).width)
        return [Row("switch", "ok", f"the same family, layer and grid; features of width {width:,}")]
    fix = "a student with the teacher's kind of vision encoder, or --lambda-vsd 0"
    if _bridge_row(teacher, student).state != "refused":
        fix = f"--switch-bridge linear (beyond the paper); or {fix}"
    return [
        Row(f"switch: {found.name}", "refused", f"{found.teacher} for the teacher, {found.student}", fix)
        for found in differences
    ]


def _bridge_row(teacher: Side, student: Side) -> Row:
    try:
        plan = plan_bridge(teacher.config, student.config)
    except CachekdError as error:
        return _refused("switch bridge", error)
    fix = "nothing, if it is meant; a student of the teacher's shape needs none"
    return Row("switch bridge", "note", f"trained, beyond the paper: {plan}", fix)


def cache_rows(
    path: str | Path,
    samples: Samples,
    data: DataOptions,
    student: Side,
    teacher: str,
    pairs: list[tuple[Encoded, Encoded]],
) -> list[Row]:
    """A cache against data, student and teacher."""
    cache = open_bound(path)
    known = [ours for _, ours in pairs if ours.key in cache]
    notes: list[Row] = []  # samples that are missing for a reason

    def same_samples() -> None:
        for encoded in known:
            ours, theirs = encoded, cache[encoded.key]
            if "cut" in {source.data.too_long for source in cache.manifest.sources}:
                ours, theirs = cut_alike(ours, theirs)
            check_sample(cache, ours, theirs)

    def same_inputs() -> None:
        lacking = check_cache(cache, samples, student.processor, student.encoder, data=data, missing="skip")
        if lacking.others:
            raise lacking.error(cache, samples)
        if len(lacking):
            causes = "; ".join([f"{len(lacking):,} of {len(samples):,} samples", *lacking.causes()])
            notes.append(Row("cache: lacks", "note", causes, "train with --missing skip"))

    tries: dict[str, Callable[[], None]] = {
        "cache: inputs and keys": same_inputs,
        "cache: samples": same_samples,
        "cache: teacher": partial(check_teacher, cache, teacher),
    }
    return [_tried(name, attempt) for name, attempt in tries.items()] + notes


def split_row(name: str, side: Side, encoded: Encoded) -> Row:
    """Vision encoder, projector and language model one after the other, against the model's own forward."""
    device = default_device()
    model = load_model(side.path, dtype=default_dtype(device), device=device)
    batch = collate([encoded], side.encoder.pad_token_id)
    batch = {key: value.to(device) for key, value in batch.items()}
    positions = predicting_positions(batch.pop("supervised"))
    with torch.no_grad():
        whole = logits_at(model, batch, positions)
        if side.image_token_id is None or "pixel_values" not in batch:
            return Row(f"{name}'s split", "note", "no image in the sample to take it apart with")
        apart = decode(model, project(model, encode(model, batch), batch), batch, positions)
    miss = float((apart.float() - whole.float()).abs().max())
    if miss == 0:
        return Row(f"{name}'s split", "ok", f"equals the whole forward at {len(whole)} tokens, bit by bit")
    deviation = float(whole.float().std())
    state: State = "note" if miss < _ROUNDING * deviation else "refused"
    return Row(f"{name}'s split", state, f"off by {miss:.2g} nats, the logits' deviation is {deviation:.2g}")


def _tried(name: str, attempt: Callable[[], None]) -> Row:
    try:
        attempt()
    except CachekdError as error:
        return _refused(name, error)
    return Row(name, "ok", "matches")


def _refused(name: str, error: CachekdError) -> Row:
    found = error.problem + (f"; {error.found}" if error.found is not None else "")
    return Row(name, "refused", found, error.fix)
