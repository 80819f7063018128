"""`cachekd peek --student`: a cache's answer tokens beside those of a student with another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.errors import CachekdError
from cachekd.models import ModelFiles
from cachekd.report.paired import END_OF_TURN
from cachekd.report.token_texts import text_of
from cachekd_cli.main import app
from caches import copied, dump_cache, reseal
from templates import shape_processor
from tiny import save_vlm, tiny_processor, write_llava_json
from tiny_texts import save_lm

ENDINGS = {
    "vicuna": "</s>",
    "gemma": "<end_of_turn>",
    "idefics": "<end_of_utterance>",
    "other words": "<|end|>",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four samples; the last has an answer that some tokenizers normalise."""
    path = write_llava_json(tmp_path_factory.mktemp("data"), 4)
    records = json.loads(path.read_text())
    records[3]["conversations"][1]["value"] = "about ½ of it"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_path, data) -> Path:
    return dump_cache(tmp_path_factory.mktemp("caches") / "cache", teacher_path, data, tail="none")


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    made = {name: shape_processor(name) for name in ("vicuna", "gemma", "idefics")}
    made["other words"] = tiny_processor(corpus=["the circle is red or green", "dogs, larger than that"])
    return {
        name: save_vlm(folder / name, processor, vocab_size=len(processor.tokenizer))
        for name, processor in made.items()
    }


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["peek", *map(str, arguments)])


def peeked(*arguments: object) -> list[dict[str, Any]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def begins(texts: list[str], ending: str) -> list[tuple[int, int]]:
    """Where tokens begin, as the turn and the letters read; a blank that begins an answer is not counted, as
    the other side's template may have written it."""
    found, answer, turn = [], "", 0
    for text in texts:
        blank = len(answer) - len(answer.lstrip())
        found.append((turn, len(answer) - blank))
        answer, turn = ("", turn + 1) if text == ending else (answer + text, turn)
    return found


@pytest.mark.parametrize("name", ENDINGS)
def test_places_are_where_both_sides_tokens_begin(cache, students, data, name):
    for sample in peeked(cache, "--student", students[name], "--data", data, "--samples", 3):
        theirs, paired = sample["tokens"], sample["paired"]
        texts = [[token["text"] for token in side] for side in (theirs, paired["tokens"])]
        assert "".join(texts[0]).replace("<|end|>", "") == "".join(
            text.removeprefix(" ") if number == 0 or texts[1][number - 1] == ENDINGS[name] else text
            for number, text in enumerate(texts[1])
        ).replace(ENDINGS[name], "")
        places = [begins(side, end) for side, end in zip(texts, ("<|end|>", ENDINGS[name]), strict=True)]
        both = set(places[0]) & set(places[1])
        aligned = [place for place in paired["places"] if place["state"] == "aligned"]
        assert [places[0][place["teacher"]] for place in aligned] == sorted(both)
        assert [places[1][place["student"]] for place in aligned] == sorted(both)
        assert paired["aligned"] == len(both)
        for place in paired["places"]:
            if place["state"] == "teacher inside a token":
                assert (place["teacher"], place["teacher_cell"]) == (None, None)
                assert places[1][place["student"]] not in places[0]
            elif place["state"] == "student inside a token":
                assert (place["student"], place["student_cell"]) == (None, None)
                assert places[0][place["teacher"]] not in places[1]
            else:
                assert place["state"] == "aligned"


@pytest.mark.parametrize("name", ENDINGS)
def test_a_cell_is_named_by_what_its_tokens_begin_with(cache, students, data, name):
    for sample in peeked(cache, "--student", students[name], "--data", data, "--samples", 3):
        for place in sample["paired"]["places"]:
            if place["state"] != "aligned":
                continue
            cell, theirs = place["teacher_cell"], sample["tokens"][place["teacher"]]["text"]
            assert place["student_cell"] == cell
            if theirs == "<|end|>":
                assert cell == END_OF_TURN
            else:
                assert cell
                assert theirs.startswith(cell)


def test_without_data_the_answers_are_read_from_the_cache(cache, students, data):
    for name, student in students.items():
        with_data = peeked(cache, "--student", student, "--data", data, "--samples", 4)
        without = peeked(cache, "--student", student, "--samples", 4)
        assert [one["paired"] for one in without] == [one["paired"] for one in with_data], name


def test_a_student_with_the_teachers_tokens_is_aligned_at_all_of_them(cache, student_path, data):
    for sample in peeked(cache, "--student", student_path, "--data", data, "--samples", 3):
        numbers = list(range(len(sample["tokens"])))
        places = sample["paired"]["places"]
        assert [(place["teacher"], place["student"]) for place in places] == [(n, n) for n in numbers]
        assert {place["state"] for place in places} == {"aligned"}


@pytest.fixture(scope="module")
def normalising(tmp_path_factory) -> Path:
    """A student that writes ½ as 1⁄2."""
    processor = shape_processor("idefics")
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    folder = tmp_path_factory.mktemp("students") / "normalising"
    return save_vlm(folder, processor, vocab_size=len(processor.tokenizer))


def test_other_bytes_are_told_and_both_sides_tokens_shown(cache, normalising, data):
    (sample,) = peeked(cache, "s003", "--student", normalising, "--data", data)
    paired = sample["paired"]
    assert paired["places"] == []
    assert paired["aligned"] == 0
    # ⁄ has no token.
    assert "1<0xE2><0x81><0x84>2" in "".join(token["text"] for token in paired["tokens"])
    shown = run(cache, "s003", "--student", normalising, "--data", data).output
    assert paired["differs"] in " ".join(shown.split())
    assert "0 of " in shown
    assert "student: ␣" in shown


def test_a_language_model_reads_the_answers_without_the_pictures(tmp_path, cache, data):
    student = save_lm(tmp_path / "student", seed=0, rows=420)
    for sample in peeked(cache, "--student", student, "--data", data, "--samples", 4):
        assert sample["paired"]["differs"] is None
        assert sample["paired"]["aligned"] > 0
        assert len(sample["images"]) == 1


def test_the_terminal_shows_a_row_for_each_place(cache, students, data):
    words = (cache, "s002", "--student", students["other words"], "--data", data)
    (sample,) = peeked(*words)
    paired, lines = sample["paired"], run(*words).output.split("\n")
    start = next(number for number, line in enumerate(lines) if "answer tokens of" in line)
    assert lines[start].startswith(f"{paired['aligned']} of {len(paired['tokens'])} answer tokens of ")
    rows = [line for line in lines[start + 2 :] if line.strip()]
    assert len(rows) == len(paired["places"])
    for row, place in zip(rows, paired["places"], strict=True):
        assert place["state"] in row
        for number, side in ((place["teacher"], sample["tokens"]), (place["student"], paired["tokens"])):
            if number is not None:
                assert side[number]["text"].replace(" ", "␣") in row


def test_an_older_cache_needs_the_teachers_folder(tmp_path, cache, students, teacher_path):
    older = copied(cache, tmp_path / "older")

    def without(values: dict[str, Any]) -> None:
        values.pop("vocabulary")
        values["teacher"]["name"] = "elsewhere/teacher"

    reseal(older / "manifest.json", without)
    error = run(older, "--student", students["gemma"]).exception
    assert isinstance(error, CachekdError)
    assert error.fix == "pass --tokenizer PATH"
    (there,) = peeked(older, "--student", students["gemma"], "--tokenizer", teacher_path)
    (new,) = peeked(cache, "--student", students["gemma"])
    assert there["paired"] == new["paired"]


def test_texts_of_the_bytes_are_those_of_the_tokenizer(cache, teacher_path):
    """But for parts of a character, which have none, and are shown as bytes."""
    tokenizer, table = tiny_processor().tokenizer, LogitCache(cache).vocabulary
    assert ModelFiles(teacher_path).token_bytes == table
    for token, content in enumerate(table.contents):
        text = tokenizer.decode([token])
        if "\ufffd" not in text:
            assert text_of(content, token) == text
    assert text_of(b"\xe2\x82", 1) == "<0xE2><0x82>"
    assert text_of(b"caf\xc3", 1) == "caf\ufffd"
    assert text_of(b"", 17) == "#17"


@pytest.mark.slow
def test_the_page_shows_a_row_for_each_place(browser, tmp_path, cache, students, normalising, data):
    for student, key in ((students["other words"], "s002"), (normalising, "s003")):
        words = (cache, key, "--student", student, "--data", data)
        (sample,) = peeked(*words)
        page = tmp_path / f"{key}.html"
        assert run(*words, "--html", page).exit_code == 0
        tab, troubles = browser.new_page(), []
        tab.on("pageerror", lambda error, all_=troubles: all_.append(str(error)))
        tab.goto(page.as_uri())
        paired = sample["paired"]
        assert tab.locator("main h3").inner_text() == f"beside {student}"
        assert tab.locator("main .paired tr.aligned").count() == paired["aligned"]
        rows = [row.split("\t") for row in tab.locator("main .paired tr").all_inner_texts()[1:]]
        assert [row[2] for row in rows] == [place["state"] for place in paired["places"]]
        for row, place in zip(rows, paired["places"], strict=True):
            sides = (place["teacher"], sample["tokens"]), (place["student"], paired["tokens"])
            texts = ["" if number is None else side[number]["text"] for number, side in sides]
            assert row[:2] == [text.replace(" ", "␣") for text in texts]
        if paired["differs"] is not None:
            assert paired["differs"] in tab.locator("main").inner_text()
            assert tab.locator("main .pieces").inner_text().count(" | ") == len(paired["tokens"]) - 1
        assert troubles == []
        tab.close()
