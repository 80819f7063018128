"""Samples that are longer than a model's context, or have tokens that a model has no embedding for."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig
from typer.testing import CliRunner

from cachekd.cache import CodecSettings, LogitCache
from cachekd.check import PairReport, Row
from cachekd.check import pair as check_module
from cachekd.check.data_rows import counts_of, lengths_of
from cachekd.config import DataOptions, DumpConfig
from cachekd.data import (
    Limits,
    SampleEncoder,
    collate,
    open_samples,
    predicting_positions,
    rough_lengths,
    survey,
)
from cachekd.dump import dump
from cachekd.dump import run as stage_one
from cachekd.dump.teacher import Answer, Teacher
from cachekd.errors import BadSample, CachekdError, LeftOut
from cachekd.models import ModelFiles, limits_of, logits_at
from cachekd.models.fingerprint import encoding_fingerprint
from cachekd_cli.main import app
from caches import SMALL
from family_samples import TWO, WIDE, encoder_of, every_family, sample
from tiny import (
    checked,
    noise_image,
    save_vlm,
    tar_members,
    tiny_processor,
    tiny_vlm,
    with_long_ones,
    write_llava_json,
    write_tar,
)
from tiny_families import build
from tiny_texts import save_lm, write_texts

LONG_ANSWER = "a large green dog. " * 40
LONG = sample("long", "<image>what is it?", LONG_ANSWER.strip(), sizes=((40, 30),))


def limited(family: str, max_tokens: int, too_long: str = "error") -> SampleEncoder:
    return SampleEncoder(encoder_of(family).processor, Limits(max_tokens, too_long=too_long))


def settings(teacher: Path, data: Path, out: Path, **changes) -> DumpConfig:
    return DumpConfig(**{"teacher": str(teacher), "data": str(data), "out": out, **SMALL, **changes})


# --- the limits of models ---------------------------------------------------------------------------


def test_the_smaller_context_and_the_fewer_rows_of_all_models_count():
    short = LlamaConfig(max_position_embeddings=512, vocab_size=400)
    few = LlamaConfig(max_position_embeddings=1024, vocab_size=300)
    short.name_or_path, few.name_or_path = "models/short", "models/few"
    found = limits_of([short, few])
    assert (found.max_tokens, found.max_tokens_of) == (512, "the context of models/short")
    assert (found.embedding_rows, found.embedding_rows_of) == (300, "models/few")
    lowered, raised = (limits_of([short, few], max_tokens=tokens, too_long="cut") for tokens in (100, 9999))
    assert (lowered.max_tokens, lowered.max_tokens_of, lowered.too_long) == (100, "--max-tokens", "cut")
    assert (raised.max_tokens, raised.max_tokens_of) == (512, "the context of models/short")


@pytest.mark.parametrize(
    ("config", "tokens"),
    [(GPT2Config(n_positions=77), 77), (MptConfig(max_seq_len=88), 88), (BloomConfig(), None)],
)
def test_a_context_under_another_name_is_found(config, tokens):
    assert limits_of([config]).max_tokens == tokens


# --- one sample -------------------------------------------------------------------------------------


def test_a_sample_may_be_as_long_as_the_limit_and_no_longer():
    length = len(encoder_of("llava")(WIDE))
    assert len(limited("llava", length)(WIDE)) == length
    with pytest.raises(BadSample) as caught:
        limited("llava", length - 1)(WIDE)
    assert caught.value.found == f"{length} tokens"
    assert caught.value.expected == f"at most {length - 1} tokens, --max-tokens"
    assert "--too-long skip" in str(caught.value)
    with pytest.raises(LeftOut):
        limited("llava", length - 1, "skip")(WIDE)


@every_family
def test_what_is_cut_is_a_beginning_of_the_whole_and_supervises_nothing_false(family):
    """The same tokens, pixels and logits, up to within the answer; no end-of-turn behind half of it."""
    whole = encoder_of(family)(LONG)
    last, last_kept = int(whole.supervised.nonzero()[-1]), int(whole.supervised.nonzero()[50])
    end = int(whole.inputs["input_ids"][last])
    cut = limited(family, last_kept + 1, "cut")(LONG)
    assert len(cut) == last_kept + 1
    assert torch.equal(cut.supervised, whole.supervised[: len(cut)])
    assert cut.token_ids.tolist() == whole.token_ids[:51].tolist()
    assert end not in cut.token_ids.tolist()
    for name, value in whole.inputs.items():
        is_per_token = value.ndim == 1
        assert torch.equal(cut.inputs[name], value[: len(cut)] if is_per_token else value), name
    model, logits = build(family), []
    for one in (whole, cut):
        batch = collate([one], 0)
        positions = predicting_positions(batch.pop("supervised"))
        with torch.no_grad():
            logits.append(logits_at(model, batch, positions))
    torch.testing.assert_close(logits[1], logits[0][:51], rtol=1e-4, atol=1e-4)


def test_a_cut_behind_an_answer_keeps_it_whole_and_drops_what_follows():
    two = sample("two", "<image>what?", "red", "and is there a blue circle?", "no", sizes=((30, 30),))
    whole = encoder_of("llava")(two)
    first = int((encoder_of("llava").turns(two) == 0).sum())
    first_end = int(whole.supervised.nonzero()[first - 1])
    encoder = limited("llava", first_end + 4, "cut")
    assert len(encoder(two)) == first_end + 1  # back to the answer's end: the question is not answered
    assert encoder(two).token_ids.tolist() == whole.token_ids[:first].tolist()
    assert encoder.turns(two).tolist() == [0] * first


def test_a_picture_is_never_cut_and_an_answer_has_to_be_left():
    with pytest.raises(BadSample, match="cut off all answers"):
        limited("llava", 10, "cut")(WIDE)
    turns = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": LONG_ANSWER.strip()}]}]
    turns += [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    later = type(TWO)("later", (noise_image(1),), tuple(turns), "test")
    assert len(encoder_of("llava")(later)) > 60
    with pytest.raises(BadSample, match="cut off an image") as caught:
        limited("llava", 60, "cut")(later)
    assert "--too-long skip" in str(caught.value)
    assert type(caught.value) is BadSample


def test_limits_are_no_part_of_the_encodings_fingerprint():
    processor = tiny_processor()
    unlimited = encoding_fingerprint(SampleEncoder(processor))
    assert unlimited == encoding_fingerprint(SampleEncoder(processor, Limits(8, embedding_rows=9)))
    assert unlimited is not None


# --- a dump -----------------------------------------------------------------------------------------


def test_a_dump_refuses_what_the_teacher_has_no_context_for(tmp_path, teacher_path):
    data = with_long_ones(tmp_path / "data", 12, (3,))
    command = ["dump", "--teacher", str(teacher_path), "--data", str(data), "--out", str(tmp_path / "c")]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, BadSample)
    said = str(refused.exception)
    for part in ("the sample is too long", "s003", "512 tokens, the context of", str(teacher_path)):
        assert part in said, part
    done = CliRunner().invoke(app, [*command, "--on-error", "skip", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["skipped"] == 1
    (skipped,) = map(json.loads, (tmp_path / "c" / "skipped.jsonl").read_text().splitlines())
    assert skipped["key"] == "s003"
    assert skipped["reason"].startswith("the sample is too long: 1,")


def test_samples_that_are_left_out_never_stop_a_dump(tmp_path, teacher_path):
    """However many in a row, from the first on; not even where a bad sample would."""
    short = {"max_tokens": 300, "too_long": "skip"}
    data = with_long_ones(tmp_path / "data", 40, tuple(range(20)) + (30,))
    summary = dump(settings(teacher_path, data, tmp_path / "c", on_error="stop", **short))
    assert (summary.finished, summary.samples, summary.skipped) == (True, 19, 21)
    everything = with_long_ones(tmp_path / "all", 20, tuple(range(20)))
    with pytest.raises(CachekdError, match="no sample can be used") as caught:
        dump(settings(teacher_path, everything, tmp_path / "none", on_error="skip", **short))
    assert "300 tokens, --max-tokens" in str(caught.value)


def test_a_cut_sample_is_cached_up_to_the_cut(tmp_path, teacher_path):
    cut = {"max_tokens": 100, "too_long": "cut"}
    data = with_long_ones(tmp_path / "data", 8, (2, 5))
    dump(settings(teacher_path, data, tmp_path / "whole", on_error="skip"))
    summary = dump(settings(teacher_path, data, tmp_path / "c", **cut))
    assert (summary.samples, summary.skipped, summary.cut) == (8, 0, 2)
    config = settings(teacher_path, data, tmp_path / "c", **cut)
    encoder = stage_one.teacher_files(config.teacher, config).encoder
    samples, cache = open_samples(data), LogitCache(tmp_path / "c")
    whole = LogitCache(tmp_path / "whole")
    for index, key in enumerate(samples.keys):
        assert torch.equal(cache[key].token_ids, encoder(samples[index]).token_ids)
        if index not in (2, 5):
            assert torch.equal(cache[key].token_ids, whole[key].token_ids)


# --- tokens without an embedding, and whatever else a teacher cannot do --------------------------------


def rows_short_by(tokens: int, path: Path) -> Path:
    """A teacher whose tokenizer has so many more tokens than the embedding has rows."""
    processor = tiny_processor()
    return save_vlm(path, processor, vocab_size=len(processor.tokenizer) - tokens)


def test_a_token_without_an_embedding_is_a_bad_sample_by_name(tmp_path):
    """The last token that the tokenizer learnt is in some samples."""
    teacher = rows_short_by(1, tmp_path / "teacher")
    data = write_llava_json(tmp_path / "data", 12)
    rows = len(tiny_processor().tokenizer) - 1
    encoder, samples = SampleEncoder(tiny_processor()), open_samples(data)
    ids = {key: encoder(samples[index]).inputs["input_ids"] for index, key in enumerate(samples.keys)}
    bad = {key for key, found in ids.items() if (found >= rows).any()}
    assert 0 < len(bad) < 12
    command = ["dump", "--teacher", str(teacher), "--data", str(data), "--out", str(tmp_path / "c")]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, BadSample)
    said = str(refused.exception)
    for part in ("has no embedding for the token", f"ids below {rows}", "resize_token_embeddings"):
        assert part in said, part
    done = CliRunner().invoke(app, [*command, "--on-error", "skip", "--json"])
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "c" / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == bad
    assert set(LogitCache(tmp_path / "c")) == set(samples.keys) - bad


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_a_teacher_cannot_run_on_is_a_bad_sample_and_its_batch_is_not(tmp_path, batch_size):
    """An image processor of another patch size: as many placeholders as the model has no features for."""
    processor = tiny_processor(patch_size=16)
    teacher = save_vlm(tmp_path / "teacher", processor, patch_size=8)
    data = write_llava_json(tmp_path / "data", 12)
    records = json.loads(data.read_text())
    for index in (0, 1, 2, 5, 6, 9, 11):
        del records[index]["image"]
        for turn in records[index]["conversations"]:
            turn["value"] = turn["value"].replace("<image>\n", "")
    data.write_text(json.dumps(records))
    config = settings(teacher, data, tmp_path / "c", batch_size=batch_size, tail="bytes=16")
    with pytest.raises(BadSample, match="the teacher cannot run on the sample") as caught:
        dump(config)
    assert "sample 's0" in str(caught.value)
    summary = dump(config.model_copy(update={"on_error": "skip"}))
    assert (summary.samples, summary.skipped) == (7, 5)
    with_image = {f"s{index:03d}" for index in (3, 4, 7, 8, 10)}
    lines = map(json.loads, (tmp_path / "c" / "skipped.jsonl").read_text().splitlines())
    skipped = {line["key"]: line["reason"] for line in lines}
    assert skipped.keys() == with_image
    assert all("the teacher cannot run on the sample: ValueError" in error for error in skipped.values())


def test_the_first_samples_need_not_be_ones_that_the_teacher_can_run_on(tmp_path):
    """The head is measured on another."""
    teacher = rows_short_by(1, tmp_path / "teacher")
    data = write_llava_json(tmp_path / "data", 12)
    samples, encoder = open_samples(data), SampleEncoder(tiny_processor())
    rows = len(tiny_processor().tokenizer) - 1
    is_bad = [bool((encoder(samples[i]).inputs["input_ids"] >= rows).any()) for i in range(12)]
    records = json.loads(data.read_text())
    order = sorted(range(12), key=lambda index: not is_bad[index])
    data.write_text(json.dumps([records[index] for index in order]))
    with pytest.MonkeyPatch.context() as patch:  # as if no config said how many rows there are
        patch.setattr(stage_one, "teacher_files", lambda path, _: ModelFiles(path))
        summary = dump(settings(teacher, data, tmp_path / "c", on_error="skip", tail="bytes=16"))
    assert (summary.samples, summary.skipped) == (12 - sum(is_bad), sum(is_bad))


def teacher_without_a_row() -> Teacher:
    """One that cannot run on samples with the last token."""
    processor = tiny_processor()
    model = tiny_vlm(processor, vocab_size=len(processor.tokenizer) - 1)
    codec = CodecSettings(top_k=8, top_p=0.99, window=64, min_k=2, logprob_step=0.1, tail="none")
    files = ModelFiles("tiny")
    files.processor = processor
    return Teacher(files, model, codec)


def test_others_of_a_failed_batch_keep_their_answers():
    teacher = teacher_without_a_row()
    good, bad = (sample("good", "?", "2"), sample("bad", "what is the color?", "no"))
    good, bad = (teacher.encoder(one) for one in (good, bad))
    answers = teacher.run([good, bad, good])
    assert [type(answer) for answer in answers] == [Answer, BadSample, Answer]
    assert "sample 'bad'" in str(answers[1])
    assert "IndexError" in str(answers[1])
    (alone,) = teacher.run([good])
    for answer in (answers[0], answers[2]):
        assert answer.targets.ids.tolist() == alone.targets.ids.tolist()


def test_bad_answers_keep_no_tensor_alive():
    """Neither the inputs nor what the model had made of them when it failed."""
    teacher = teacher_without_a_row()
    encoded = [teacher.encoder(sample(f"s{i}", "what is the color?", "no")) for i in range(20)]

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    before = tensors()
    answers = [*teacher.run(encoded[:4]), *(answer for one in encoded[4:] for answer in teacher.run([one]))]
    assert [type(answer) for answer in answers] == [BadSample] * 20
    assert "IndexError" in str(answers[0])
    assert tensors() == before


def test_a_language_model_has_limits_too(tmp_path):
    teacher = save_lm(tmp_path / "teacher", seed=1, rows=300)
    data = write_texts(tmp_path / "data.jsonl", 6)
    with pytest.raises(BadSample, match="has no embedding for the token"):
        dump(settings(teacher, data, tmp_path / "c"))


# --- check ------------------------------------------------------------------------------------------


def row_of(report: PairReport, name: str) -> Row:
    return next(row for row in report.rows if row.name == name)


def true_lengths(data: Path) -> list[int]:
    samples, encoder = open_samples(data), SampleEncoder(tiny_processor())
    return sorted(len(encoder(samples[index])) for index in range(len(samples)))


def test_check_shows_how_long_samples_are_and_how_many_are_too_long(tmp_path, teacher_path, student_path):
    data = with_long_ones(tmp_path / "data", 150, (7, 70))
    command = ["check", "--teacher", str(teacher_path), "--student", str(student_path), "--data", str(data)]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 2, done.output  # a dump would stop at the first of them
    found, true = json.loads(done.stdout)["lengths"], true_lengths(data)
    assert found["samples"] == 150
    assert found["beyond"] == 2
    assert (found["limit"], found["limit_of"].startswith("the context of")) == (512, True)
    assert found["median"] == pytest.approx(true[75], abs=4)
    assert found["p99"] == pytest.approx(true[-2], abs=4)
    assert found["longest"] == pytest.approx(true[-1], abs=4)
    for options, state, told in (
        ({}, "refused", ""),
        ({"on_error": "skip"}, "note", ", which are left out"),
        ({"too_long": "skip"}, "note", ", which are left out"),
        ({"too_long": "cut"}, "note", ", which are cut"),
    ):
        asked = DataOptions.of(data, max_tokens=46, **options)
        lowered = checked(str(teacher_path), str(student_path), asked)
        assert lowered.lengths is not None
        assert lowered.lengths.beyond == sum(length > 46 for length in true)
        row = row_of(lowered, "length")
        assert (row.state, "about" in row.found) == (state, True)
        assert row.found.endswith(f"beyond 46, --max-tokens{told}")
    short = write_llava_json(tmp_path / "short", 4)
    row = row_of(checked(str(teacher_path), str(student_path), str(short)), "length")
    assert (row.state, "none beyond 512" in row.found) == ("ok", True)


@pytest.mark.parametrize(("tokens", "index", "state"), [(1, 0, "refused"), (1, 1, "note"), (0, 0, "ok")])
def test_check_says_how_many_tokens_have_no_embedding(tmp_path, teacher_path, tokens, index, state):
    """Refused where a sample that is looked at has one."""
    student = rows_short_by(tokens, tmp_path / "student")
    data = write_llava_json(tmp_path / "data", 2)
    data.write_text(json.dumps([json.loads(data.read_text())[index]]))
    report = checked(str(teacher_path), str(student), str(data))
    row = row_of(report, "embedding rows")
    assert row.state == state
    assert report.fits == (state != "refused")
    if tokens:
        assert f"317 in {student} for 318 tokens: 1 have none" in row.found


def test_lengths_do_without_bad_samples_and_bad_records(tmp_path, teacher_path, student_path):
    """Half of the images cannot be opened, and a record cannot be read."""
    members = tar_members(40)
    for index in range(0, 40, 2):
        members[2 * index] = (members[2 * index][0], b"not a png")
    members[2 * 9 + 1] = (members[2 * 9 + 1][0], b"{")
    data = write_tar(tmp_path / "data" / "0.tar", members)
    samples, encoder = open_samples(data), SampleEncoder(tiny_processor(), Limits(20))
    lengths, whole = rough_lengths(samples, encoder), encoder.without_limits()
    assert len(lengths) == 40
    assert [index for index, length in enumerate(lengths) if length == 0] == [9]
    for index in range(1, 40, 2):
        if index != 9:
            assert lengths[index] == pytest.approx(len(whole(samples[index])), abs=3)
    seen = survey(samples, encoder)
    assert lengths_of(seen, Limits()).samples == 39
    assert counts_of(seen, samples).unreadable == 1
    nothing = write_tar(tmp_path / "none.tar", [(name, b"{") for name, _ in tar_members(4)])
    with pytest.raises(BadSample):
        rough_lengths(open_samples(nothing), encoder)


def test_of_data_elsewhere_a_part_is_looked_at(tmp_path, teacher_path, student_path, monkeypatch):
    monkeypatch.setattr(check_module, "FAR_SAMPLES", 5)
    write_tar(tmp_path / "0.tar", tar_members(12))
    report = checked(str(teacher_path), str(student_path), f"file://{tmp_path}/0.tar")
    assert report.lengths is not None
    assert report.lengths.samples == 5
