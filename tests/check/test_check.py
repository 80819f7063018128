"""`cachekd check`: every reason why a pair would not do, in one look."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import CLIPImageProcessor
from typer.testing import CliRunner

from cachekd.check import Row, preview
from cachekd.check.rows import require
from cachekd.config import TrainConfig
from cachekd.data import SampleEncoder, open_samples
from cachekd.errors import CachekdError
from cachekd.models import families, load_processor
from cachekd.models.families import changed
from cachekd.train.open import open_run
from cachekd_cli.main import app
from tiny import MARKED_TEMPLATE, checked, save_vlm, tiny_processor, tiny_vlm, write_llava_json


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_llava_json(tmp_path_factory.mktemp("data"), 4)


def states(report) -> dict[str, str]:
    return {row.name: row.state for row in report.rows}


def test_a_pair_that_fits(teacher_path, student_path, data_path, cache_path):
    report = checked(str(teacher_path), str(student_path), str(data_path), cache=cache_path, forward=True)
    assert report.fits
    assert set(states(report).values()) == {"ok"}
    assert {"vocabulary", "switch", "cache: teacher", "teacher's split"} <= states(report).keys()


def test_a_split_that_is_none_is_refused_as_training_refuses_it(
    teacher_path, student_path, data_path, monkeypatch
):
    right = families.FAMILIES["llava"]

    def halved(tower, output):
        states = tuple(None if state is None else state / 2 for state in output.hidden_states)
        return right.replay(tower, changed(output, hidden_states=states))

    monkeypatch.setitem(families.FAMILIES, "llava", replace(right, replay=halved))
    report = checked(str(teacher_path), str(student_path), str(data_path), forward=True)
    [row] = [row for row in report.rows if row.name == "student's split"]
    assert row.state == "refused"
    assert "of their deviation" in row.found
    assert row.fix == "train without the switched path: --lambda-vsd 0"


def test_sizes_are_those_of_the_loaded_models(teacher_path, student_path, data_path):
    sizes = checked(str(teacher_path), str(student_path), str(data_path)).sizes
    teacher = tiny_vlm(tiny_processor(), text_width=48, vision_layers=3)
    counts = {
        "vision_encoder": sum(p.numel() for p in teacher.model.vision_tower.parameters()),
        "projector": sum(p.numel() for p in teacher.model.multi_modal_projector.parameters()),
        "language_model": sum(p.numel() for p in teacher.model.language_model.parameters())
        + teacher.lm_head.weight.numel(),
    }
    assert sizes.teacher == counts
    assert sizes.teacher_bytes == 4 * (counts["projector"] + counts["language_model"])
    assert sizes.student_bytes == 16 * sum(p.numel() for p in tiny_vlm(tiny_processor()).parameters())


def test_every_difference_is_shown_and_not_only_the_first(tmp_path, teacher_path, data):
    other = tiny_processor(corpus=["quite other words"] * 5, template=MARKED_TEMPLATE + " ", patch_size=16)
    student = save_vlm(tmp_path / "student", other, vision_width=64, patch_size=16)
    report = checked(str(teacher_path), str(student), str(data))
    found = states(report)
    assert not report.fits
    for name in ("vocabulary", "chat template", "image tokens"):
        assert found[name] == "note", name
    refused = [name for name, state in found.items() if state == "refused" and name.startswith("switch")]
    assert any("width" in name for name in refused)
    assert any("image tokens" in name for name in refused)


def test_padded_vocabularies_are_no_difference(tmp_path, teacher_path, data):
    student = save_vlm(tmp_path / "student", tiny_processor(), vocab_size=448)
    report = checked(str(teacher_path), str(student), str(data))
    assert report.fits
    assert "320 and 448 rows" in report.rows[0].found


def test_other_image_processing_is_noted_by_the_pixels(tmp_path, teacher_path, data):
    """Settings that make the same pixels are fine; those that make others are said."""
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    for name, settings, state in (
        ("same", {"do_convert_rgb": False}, "ok"),
        ("other", {"image_mean": [0.1, 0.2, 0.3]}, "note"),
    ):
        processor = tiny_processor()
        processor.image_processor = CLIPImageProcessor(**size, **settings)
        student = save_vlm(tmp_path / name, processor)
        report = checked(str(teacher_path), str(student), str(data))
        assert states(report)["image processing"] == state, name
        assert report.fits


def refusal_of_a_run(tmp_path, teacher, student, data) -> CachekdError:
    """By a live teacher."""
    config = TrainConfig(
        student=str(student), teacher=str(teacher), data=str(data), out=tmp_path / "run", live_teacher=True
    )
    with pytest.raises(CachekdError) as caught:
        open_run(config, tmp_path / "none", lambda _: None)
    return caught.value


def test_training_is_refused_by_the_first_row_that_check_refuses(tmp_path, teacher_path, data):
    student = save_vlm(tmp_path / "student", tiny_processor(), vision_width=64)
    rows = checked(str(teacher_path), str(student), str(data)).rows
    refused = [row.error for row in rows if row.state == "refused" and row.problem]
    said = refusal_of_a_run(tmp_path, teacher_path, student, data)
    assert str(said) in map(str, refused)
    assert said.fix


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"corpus": ["quite other words"] * 5}, "vocabulary"),
        ({"template": MARKED_TEMPLATE + " "}, "chat template"),
    ],
    ids=["vocabulary", "chat template"],
)
def test_what_training_refuses_without_align_vocabulary_is_noted_with_it(
    tmp_path, teacher_path, data, changed, name
):
    student = save_vlm(tmp_path / "student", tiny_processor(**changed))
    report = checked(str(teacher_path), str(student), str(data))
    [row] = [row for row in report.rows if row.name == name]
    assert report.fits
    assert row.state == "note"
    assert "--align-vocabulary cells" in row.fix
    assert "--align-vocabulary cells" in refusal_of_a_run(tmp_path, teacher_path, student, data).fix


def test_rows_behind_a_refusal_are_not_computed():
    def rows():
        yield Row("one", "note", "some")
        yield Row("two", "refused", "3", "mend it", problem="too many", where="here", expected="2")
        raise AssertionError

    with pytest.raises(CachekdError) as caught:
        require(rows())
    said = caught.value
    assert (said.problem, said.where, said.expected) == ("too many", "here", "2")
    assert (said.found, said.fix) == ("3", "mend it")
    require([Row("one", "ok", "all")])


def test_another_cache_is_refused_with_the_reason(tmp_path, teacher_path, student_path, data, cache_path):
    report = checked(str(student_path), str(student_path), str(data), cache=cache_path)
    found = states(report)
    assert found["cache: teacher"] == "refused"
    assert not report.fits


def test_the_preview_is_the_sample_token_by_token(student_path, data):
    processor = load_processor(str(student_path))
    encoded = SampleEncoder(processor)(open_samples(data)[1])
    image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    runs = preview(encoded, processor.tokenizer, image_token_id)
    assert sum(run.tokens for run in runs) == len(encoded)
    assert [(run.text, run.tokens) for run in runs if run.kind == "image"] == [("<image>", 16)]
    answers = [answer for _, answer in open_samples(data)[1].questions]
    assert [run.text for run in runs if run.kind == "supervised"] == [
        f"{answer}<|end|>" for answer in answers
    ]


def test_the_command_shows_what_is_supervised_and_exits_with_its_verdict(
    tmp_path, teacher_path, student_path, data
):
    common = ["check", "--teacher", str(teacher_path), "--data", str(data)]
    good = CliRunner().invoke(app, [*common, "--student", str(student_path)])
    assert good.exit_code == 0, good.output
    assert "<image x 16>" in good.output
    assert "they fit" in good.output
    student = save_vlm(tmp_path / "student", tiny_processor(), vision_width=64)
    bad = CliRunner().invoke(app, [*common, "--student", str(student), "--json"])
    assert bad.exit_code == 2
    report = json.loads(bad.stdout)
    assert report["fits"] is False
    assert any(row["state"] == "refused" and "width" in row["name"] for row in report["rows"])


def test_a_key_and_a_text_are_shown_as_what_they_are(tmp_path, teacher_path, student_path):
    """Neither as markup, of which an end without a beginning is an error, nor as commands to the terminal."""
    path = write_llava_json(tmp_path, 2)
    records = json.loads(path.read_text())
    records[0]["id"] = "[/x]\x1b[2J"
    records[0]["conversations"][0]["value"] = "<image>\n[/y]\x1b[2J"
    path.write_text(json.dumps(records))
    words = ["check", "--teacher", str(teacher_path), "--student", str(student_path), "--data", str(path)]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.exception
    assert "\x1b[2J" not in shown.output
    assert r"sample [/x]\x1b[2J" in shown.output
    assert r"\x1b[2J" in shown.output.replace(r"sample [/x]\x1b[2J", "")
