"""`cachekd check` where teacher and student read text in two ways: what of their answers is aligned."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from cachekd.check.side_by_side import Aligned, SideBySide
from cachekd.data import open_samples
from cachekd.vocabulary import VocabularyPair
from cachekd_cli.main import app
from caches import copied, dump_cache, reseal
from templates import shape_processor
from tiny import checked, save_vlm, tiny_processor, write_llava_json
from tiny_families import FAMILIES, build
from tiny_texts import save_lm, write_texts
from vocabularies import from_npm, smollm2, vocabulary

OTHER_WORDS = ["the circle is red or green", "dogs and shapes, larger than that", "noise", "yesterday"]
PROCESSORS = {
    "vicuna": lambda: shape_processor("vicuna"),
    "gemma": lambda: shape_processor("gemma"),
    "idefics": lambda: shape_processor("idefics"),
    "other words": lambda: tiny_processor(corpus=OTHER_WORDS),
}
WRITTEN_BEFORE = {"idefics": " "}  # by its template, as a part of the answer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_llava_json(tmp_path_factory.mktemp("data"), 6)


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    return {
        name: save_vlm(folder / name, processor := make(), vocab_size=len(processor.tokenizer))
        for name, make in PROCESSORS.items()
    }


def row_of(report, name: str):
    [row] = [row for row in report.rows if row.name == name]
    return row


def begins(processor, sample, before: str = "") -> list[tuple[int, int]]:
    """Where an answer's tokens begin, as the turn and the letters read of it, by the tokenizer's own offsets.
    The end of turn is a token too."""
    found = []
    for turn, (_, answer) in enumerate(sample.questions):
        encoded = processor.tokenizer(before + answer, add_special_tokens=False, return_offsets_mapping=True)
        ends = [max(0, end - len(before)) for _, end in encoded["offset_mapping"]]
        found += [(turn, place) for place in (0, *ends)]
    return found


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_figures_are_those_of_the_tokenizers_own_offsets(teacher_path, students, data, name):
    report = checked(teacher_path, students[name], data)
    assert report.fits
    counts = [0, 0, 0]
    for sample in open_samples(data):
        theirs = begins(tiny_processor(), sample)
        ours = begins(PROCESSORS[name](), sample, WRITTEN_BEFORE.get(name, ""))
        found = (len(theirs), len(ours), len(set(theirs) & set(ours)))
        counts = [count + more for count, more in zip(counts, found, strict=True)]
    answers = report.across.answers
    assert (answers.samples, answers.teacher_tokens, answers.student_tokens) == (6, *counts[:2])
    assert answers.common == counts[2]
    # All letters are tokens of both, so that every token is in the cell of its first letter at least.
    assert answers.rows == counts[2]
    assert answers.one_to_one <= answers.rows
    assert answers.rows + answers.lost.total() == answers.student_tokens
    assert answers.differing == {}
    assert report.across.shared.strings >= 256
    states = {row.name: row.state for row in report.rows}
    assert states["vocabulary"] == "note"
    assert states["answers' bytes"] == states["switch"] == "ok"
    assert "answer tokens" not in states
    share = answers.rows / answers.student_tokens
    assert row_of(report, "aligned answers").text.startswith(f"{share:.1%} of {answers.student_tokens} ")


def test_a_pair_that_reads_alike_has_none_of_these_rows(teacher_path, student_path, data):
    report = checked(teacher_path, student_path, data)
    assert report.across is None
    names = {row.name for row in report.rows}
    assert {"answer tokens", "embedding rows"} <= names
    assert not names & {"aligned answers", "answers' bytes", "cache: token bytes"}


def test_each_side_needs_embeddings_of_its_own_tokens(tmp_path, teacher_path, data):
    processor = shape_processor("vicuna")
    assert len(processor.tokenizer) > 320  # the teacher's rows
    student = save_vlm(tmp_path / "student", processor, vocab_size=len(processor.tokenizer))
    report = checked(teacher_path, student, data)
    assert row_of(report, "teacher's embedding rows").state == "ok"
    assert row_of(report, "student's embedding rows").state == "ok"
    short = save_vlm(tmp_path / "short", processor, vocab_size=len(processor.tokenizer) - 1)
    row = row_of(checked(teacher_path, short, data), "student's embedding rows")
    assert row.state == "refused"
    assert f"for {len(processor.tokenizer)} tokens: 1 have none" in row.text


def test_a_student_that_takes_no_text_alone_is_asked_with_the_images(tmp_path, teacher_path):
    """PaliGemma: the answers are those of the samples that are shown."""
    path = write_llava_json(tmp_path / "data", 5)
    records = json.loads(path.read_text())
    for record in records:
        record["conversations"] = record["conversations"][:2]
    path.write_text(json.dumps(records))
    build("paligemma").save_pretrained(tmp_path / "student")
    FAMILIES["paligemma"].processor().save_pretrained(tmp_path / "student")
    report = checked(teacher_path, tmp_path / "student", path, samples=3)
    answers = report.across.answers
    assert (answers.samples, answers.differing) == (3, {})
    assert 0 < answers.rows <= answers.common


def test_a_tokenizer_that_does_not_say_its_bytes_is_a_row(tmp_path, teacher_path, data):
    processor = shape_processor("gemma")
    steps = [decoders.Replace(Regex("▁"), " "), decoders.ByteFallback(), decoders.Fuse()]
    processor.tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    student = save_vlm(tmp_path / "student", processor, vocab_size=len(processor.tokenizer))
    report = checked(teacher_path, student, data)
    assert not report.fits
    assert report.across is None
    row = row_of(report, "vocabulary")
    assert (row.state, row.fix) == ("refused", "--lambda-align 0: L_VSD does not need it")
    assert "Replace with a regular expression" in row.text
    assert "answer tokens" not in {row.name for row in report.rows}


def test_the_figures_are_in_the_json(teacher_path, students, data):
    words = ["check", "--teacher", teacher_path, "--student", students["other words"], "--data", data]
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)["across"]
    answers = found["answers"]
    assert found["shared"].keys() == {"teacher", "student", "strings", "cells"}
    assert answers["rows"] + sum(answers["lost"].values()) == answers["student_tokens"]
    assert answers["lost"]["inside words"] > 0
    assert answers["differing"] == {}
    shown = CliRunner().invoke(app, list(map(str, words)))
    assert shown.exit_code == 0
    assert "--align-vocabulary" in shown.output


# ---- the cache is compared with the teacher


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_path, data) -> Path:
    return dump_cache(tmp_path_factory.mktemp("caches") / "cache", teacher_path, data)


def test_the_cache_is_compared_with_the_teacher(teacher_path, students, data, cache):
    report = checked(teacher_path, students["vicuna"], data, cache=cache)
    rows = {row.name: row.state for row in report.rows if row.name.startswith("cache")}
    names = ("inputs and keys", "samples", "teacher", "token bytes")
    assert rows == {f"cache: {name}": "ok" for name in names}


def test_a_cache_of_the_students_own_text_is_refused(tmp_path, teacher_path, students, data):
    own = dump_cache(tmp_path / "cache", students["vicuna"], data)
    report = checked(teacher_path, students["vicuna"], data, cache=own)
    row = row_of(report, "cache: inputs and keys")
    assert row.state == "refused"
    assert "a different tokenizer than the teacher's" in row.problem
    assert row_of(report, "cache: token bytes").state == "refused"


def test_an_older_cache_without_token_bytes_is_noted(tmp_path, teacher_path, students, data, cache):
    older = copied(cache, tmp_path / "older")
    reseal(older / "manifest.json", lambda values: values.pop("vocabulary"))
    report = checked(teacher_path, students["vicuna"], data, cache=older)
    assert report.fits
    assert row_of(report, "cache: token bytes").state == "note"


# ---- language models, where the text makes the difference


def with_answers(path: Path, answers: dict[str, str]) -> Path:
    records = (
        {
            "id": key,
            "messages": [{"role": "user", "content": "go on"}, {"role": "assistant", "content": answer}],
        }
        for key, answer in answers.items()
    )
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def save_reader(path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny language model that reads as this tokenizer."""
    save_lm(path, seed=1, rows=len(tokenizer))
    tokenizer.save_pretrained(path)
    return path


def normalised(name: str) -> PreTrainedTokenizerFast:
    tokenizer = shape_processor(name).tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def test_samples_whose_answers_are_other_bytes_are_named(tmp_path):
    data = with_answers(
        tmp_path / "data.jsonl", {"plain": "one of two", "half": "about ½ of it", "same": "ok"}
    )
    teacher = save_lm(tmp_path / "teacher", seed=0, rows=420)
    student = save_reader(tmp_path / "student", normalised("phi3"))
    report = checked(teacher, student, data)
    assert report.fits
    row = row_of(report, "answers' bytes")
    assert row.state == "note"
    assert "1 of 3 sample(s) differ" in row.text
    assert "'half'" in row.text
    assert "plain" not in row.text
    answers = report.across.answers
    assert answers.differing.keys() == {"half"}
    half = shape_processor("phi3").tokenizer("about 1⁄2 of it<|end|>", add_special_tokens=False)
    assert answers.lost["other bytes"] == len(half["input_ids"])


def test_below_four_fifths_the_reasons_are_told(tmp_path):
    """The teacher knows Chinese by words, the student by bytes."""
    text = "一只白色的猫坐在红色的沙发上"
    teacher, student = shape_processor("qwen3").tokenizer, shape_processor("phi3").tokenizer
    teacher.add_tokens([text[:7], text[7:]])
    data = with_answers(tmp_path / "data.jsonl", {"a": text, "b": text})
    paths = save_reader(tmp_path / "teacher", teacher), save_reader(tmp_path / "student", student)
    report = checked(*paths, data)
    row = row_of(report, "aligned answers")
    assert row.state == "note"
    # Of 14 characters of three bytes each the ends of two words, and the end of turn.
    assert row.text.startswith("7.0% of 86 answer tokens")
    assert "not aligned: CJK 93.0%" in row.text
    assert report.across.answers.lost == {"CJK": 80}


def test_a_student_whose_template_ends_no_turn(tmp_path):
    """What the teacher alone says there is passed over; nothing is lost of the student's."""
    data = write_texts(tmp_path / "data.jsonl", 4)
    teacher = save_lm(tmp_path / "teacher", seed=0, rows=420)
    tokenizer = shape_processor("mistral").tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace(" + eos_token", "")
    student = save_reader(tmp_path / "student", tokenizer)
    answers = checked(teacher, student, data).across.answers
    assert answers.samples == 4
    assert answers.rows > 0
    assert "end of turn" not in answers.lost


# ---- reasons, by hand


@pytest.mark.parametrize(
    ("word", "pieces", "reason"),
    [
        ("    ", ["  ", "  "], "blanks"),
        (" 7", [" ", "7"], "blanks"),
        ("2024", ["20", "24"], "digits"),
        ("漢字", ["漢", "字"], "CJK"),
        ("ですか", ["です", "か"], "CJK"),
        ("고양이", ["고", "양이"], "CJK"),
        ("window", ["win", "dow"], "inside words"),
        ("naïve", ["na", "ïve"], "inside words"),
        ("():", ["()", ":"], "signs, as in code"),
        ("x=", ["x", "="], "signs, as in code"),
        ("3.", ["3", "."], "signs, as in code"),
        ("🙂🙂", ["🙂", "🙂"], "signs, as in code"),
    ],
)
def test_what_stands_where_the_teacher_is_inside_a_token_is_told(word, pieces, reason):
    """The second token of the student begins where the teacher has not ended."""
    texts = [piece.encode() for piece in dict.fromkeys(pieces)]
    pair = VocabularyPair.of(
        vocabulary("<end>", word.encode(), *texts, end=0), vocabulary("<end>", *texts, end=0), "cells"
    )
    found = Aligned()
    found.add(SideBySide(pair), "k", [1, 0], [1 + texts.index(piece.encode()) for piece in pieces] + [0])
    assert found.lost == {reason: 1}
    assert (found.rows, found.student_tokens) == (2, 3)


def test_a_character_that_is_cut_is_told_by_the_whole_of_it():
    for character, reason in (("漢", "CJK"), ("é", "inside words"), ("🙂", "signs, as in code")):
        content = character.encode()
        singles = [bytes([byte]) for byte in content]
        pair = VocabularyPair.of(
            vocabulary("<end>", content, *singles, end=0), vocabulary("<end>", *singles, end=0), "cells"
        )
        found = Aligned()
        found.add(SideBySide(pair), "k", [1, 0], [*range(1, 1 + len(singles)), 0])
        assert found.lost == {reason: len(singles) - 1}


# ---- side by side


def pieces_of(text: str, cuts: set[int]) -> list[bytes]:
    content = text.encode()
    ends = sorted(cut for cut in cuts if 0 < cut < len(content))
    return [content[a:b] for a, b in pairwise([0, *ends, len(content)]) if a < b]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab é日", min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=3),
    st.lists(st.sets(st.integers(1, 20)), min_size=6, max_size=6),
)
def test_every_token_has_one_place_and_its_state_is_what_the_other_side_has_read(texts, cuts):
    answers = [
        [
            piece
            for text, cut in zip(texts, cuts[side::2], strict=False)
            for piece in (*pieces_of(text, cut), None)
        ]
        for side in (0, 1)
    ]
    tables = [sorted({piece for piece in side if piece is not None}) for side in answers]
    vocabularies = [vocabulary("<end>", *table, end=0) for table in tables]
    ids = [
        [0 if piece is None else 1 + table.index(piece) for piece in side]
        for side, table in zip(answers, tables, strict=True)
    ]
    pair = VocabularyPair.of(*vocabularies, "cells")
    aligned = pair.aligned(*ids)
    found = SideBySide(pair).places(*ids, aligned)
    for side, name in enumerate(("teacher", "student")):
        numbers = [number for place in found if (number := getattr(place, name)) is not None]
        assert numbers == list(range(len(ids[side])))
    rows = {(int(i), int(j)) for sides in aligned.rows.values() for i, j in zip(*sides, strict=True)}
    assert {(p.teacher, p.student) for p in found if p.state == "aligned"} == rows
    read = [dict(enumerate(read_before(side))) for side in answers]
    for place in found:
        if place.state in ("aligned", "other cells"):
            assert read[0][place.teacher] == read[1][place.student]
        elif place.state == "teacher inside a token":
            assert place.teacher is None
            assert read[1][place.student] not in read[0].values()
        else:
            assert place.student is None
            assert read[0][place.teacher] not in read[1].values()


def read_before(tokens: list[bytes | None]) -> list[tuple[int, int, bool]]:
    """For each token the turn, the bytes of it that were read, and whether it ends it."""
    found, turn, read = [], 0, 0
    for token in tokens:
        found.append((turn, read, token is None))
        turn, read = (turn + 1, 0) if token is None else (turn, read + len(token))
    return found


# ---- a real pair

KITCHEN = (
    "The image shows a small kitchen with white cabinets and a wooden counter. On the left there is a "
    "stainless steel refrigerator covered with colourful magnets, and next to it stands an old gas stove. "
    "Sunlight comes in through the window above the sink, where two potted plants are growing."
)
STREET = (
    "A busy street in the evening: several people are waiting at a crosswalk while a yellow taxi drives "
    "past. The shops behind them have bright neon signs, which are reflected on the wet pavement."
)


@pytest.mark.slow
def test_qwen3_and_smollm2(tmp_path):
    """English is aligned nearly everywhere, Chinese at half of the student's tokens, by far most for CJK."""
    data = {
        "english": {"kitchen": KITCHEN, "street": STREET},
        "chinese": {
            "cat": "一只白色的猫坐在红色的沙发上，旁边有两个孩子在看书。",
            "dog": "两只狗在公园里跑。",
        },
    }
    sides = []
    for name, backend in (("qwen3", from_npm("qwen3", tmp_path)), ("smollm2", smollm2())):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(backend.to_str()),
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
        )
        tokenizer.chat_template = shape_processor("qwen3").tokenizer.chat_template
        sides.append(save_reader(tmp_path / name, tokenizer))
    reports = {
        name: checked(*sides, with_answers(tmp_path / f"{name}.jsonl", answers))
        for name, answers in data.items()
    }
    shared = reports["english"].across.shared
    assert 39_000 < shared.strings < 39_500  # 39,234 in our prototype
    assert row_of(reports["english"], "aligned answers").state == "ok"
    answers = reports["english"].across.answers
    assert answers.rows / answers.student_tokens > 0.95
    chinese = reports["chinese"].across.answers
    assert 0.3 < chinese.rows / chinese.student_tokens < 0.7
    assert chinese.lost.most_common(1)[0][0] == "CJK"
    assert "not aligned: CJK" in row_of(reports["chinese"], "aligned answers").text
