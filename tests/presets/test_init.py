"""`cachekd init`: the file that it writes, what it says, and that the file is a pipeline that runs."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from cachekd.check.memory import StepMemory
from cachekd.config import DumpConfig, TrainConfig
from cachekd.errors import CachekdError
from cachekd.pipeline import expand, plan_steps, read_pipeline
from cachekd.pipeline.checks import check_steps
from cachekd.presets.cards import CARDS, WAYS, Chosen
from cachekd.presets.cost import TFLOPS, cost_of
from cachekd.presets.file import changes, text_of, write
from cachekd.presets.fit import fit_of
from cachekd.presets.pairs import PAIRS
from cachekd.presets.proposal import Proposal, count_of, of_preset
from cachekd.presets.sample import Assumed, Read
from cachekd_cli.init import _MOST_PIXELS, init_command
from cachekd_cli.main import app
from templates import shape_processor
from tiny import save_vlm, tar_members, tiny_processor, write_llava_json, write_tar

GB = 10**9


def run(*words: object):
    return CliRunner().invoke(app, ["init", *map(str, words)])


def error_of(*words: object) -> str:
    result = run(*words)
    assert isinstance(result.exception, CachekdError), result.output
    return str(result.exception)


class Tokens:
    def __len__(self) -> int:
        return 641


def proposal_of(name: str, card: int, ways: dict[int, int]) -> Proposal:
    """What would be proposed if these ways were the first that fit; no step is computed.

    Args:
        ways: by card, the number of one in `WAYS`.
    """
    pair = PAIRS[name]
    teacher, student, own_text = of_preset(pair)
    read, assumed = Read(Tokens(), 391, 1564), Assumed()  # type: ignore[arg-type]
    memory = StepMemory(GB, 2 * GB, GB, 2 * GB, 3 * GB, GB, GB // 10, 11 * GB)
    batches = {"batch_size": 4, "gradient_accumulation": 8, "gradient_checkpointing": True}
    chosen = {
        each: Chosen(each, WAYS[way] | batches, {"device_map": "auto"} if way == 7 else {}, memory, 24 * GB)
        for each, way in ways.items()
    }
    cost = cost_of(
        teacher.parameters, student.parameters, read, read, assumed, switched=True, recomputed=True, tflops=50
    )
    fit = fit_of(teacher.config, student.config, own_text=own_text)
    return Proposal(pair, teacher, student, fit, read, read, assumed, chosen, card, cost, None, None)


# ---- the file of every pair


@pytest.mark.parametrize("way", range(len(WAYS)))
@pytest.mark.parametrize("name", PAIRS)
def test_every_file_is_a_pipeline_that_says_what_was_chosen(tmp_path, name, way):
    """Whatever fits: each way to train, in the file of each pair."""
    pair = PAIRS[name]
    proposal = proposal_of(name, 24, {24: way, 48: 1, 80: 0})
    path = write(proposal, tmp_path / "run", "cachekd init ...")
    pipeline = read_pipeline(path)
    steps = {step.name: step for step in plan_steps(pipeline)}
    expand(pipeline)
    dump, last = steps["cache"].config, steps["dft" if pair.stages else "student"].config
    assert isinstance(dump, DumpConfig)
    assert isinstance(last, TrainConfig)
    teacher = pair.folders[0] if pair.folders else proposal.teacher.name
    assert dump.teacher == teacher
    assert (dump.device_map, dump.quantization) == ("auto" if way == 7 else None, None)
    for setting, value in proposal.chosen[24].train.items():
        assert getattr(last, setting) == value, setting
    assert last.lambda_align == 1
    assert last.lambda_vsd == (0 if pair.switch == "none" else 1)
    assert last.switch_bridge == ("linear" if pair.switch == "linear" else None)
    assert last.align_vocabulary == ("cells" if pair.tokenizers == "two" else "none")
    assert last.teacher == (None if pair.switch == "none" else teacher)
    assert steps["page"].config.run == str(last.out)


def test_the_pair_of_the_paper_is_trained_in_stages(tmp_path):
    path = write(proposal_of("tinyllava-3b-0.5b", 24, dict.fromkeys(CARDS, 1)), tmp_path / "run", "...")
    steps = {step.name: step for step in plan_steps(read_pipeline(path))}
    assert [name for name, step in steps.items() if step.kind == "train"] == ["dpt", "sft", "dft"]
    assert steps["dpt"].upstream == ("cache-captions",)
    assert steps["dpt"].config.data == "data/captions"
    assert steps["sft"].continues == "dpt"
    assert steps["dft"].continues == "sft"
    assert "cache" in steps["dft"].upstream
    assert steps["sft"].config.cache is None
    text = path.read_text()
    assert "cachekd convert models/tinyllava-original -o models/tinyllava-3b" in text


@pytest.mark.parametrize("name", PAIRS)
def test_every_setting_has_its_reason_above_it(name):
    text = text_of(proposal_of(name, 24, {24: 7, 48: 4, 80: 0}), Path("runs/x"), "cachekd init ...")
    lines = text.splitlines()
    train = lines[lines.index("  train:") + 1 : lines.index("steps:")]
    for above, line in zip(["", *train], train, strict=False):
        if line.strip() and not line.lstrip().startswith("#"):
            assert above.lstrip().startswith("#"), line
    assert all(len(line) <= 160 for line in lines)
    comments = " ".join(line.lstrip(" #") for line in lines)
    assert "cachekd check --teacher" in text
    assert "Not run: the published shapes were tested" in comments
    assert "At 48 GB:" in comments
    assert re.search(r"At 48 GB: leave out [^:]*`student_quantization`", comments)
    assert "11.0 GB at the most" in comments
    assert "Time, an estimate at a sustained 50 TFLOP/s" in comments
    assert "100,000 samples x 100 answer tokens x 112 bytes = 1.1 GB" in comments
    assert "the student's weights" in comments
    assert "The most is not the sum" in comments
    assert re.search(r"data/train\b", text)


def test_the_steps_in_comments_are_steps(tmp_path):
    """Baseline and scores, with the # taken away."""
    for name in ("smolvlm2-2.2b-256m", "qwen2.5-vl-7b-smolvlm2-500m", "tinyllava-3b-0.5b"):
        text = text_of(proposal_of(name, 24, dict.fromkeys(CARDS, 1)), tmp_path / "run", "...")
        text = re.sub(r"^  # ((?:- step: |  \w+: ).*)$", r"  \1", text, flags=re.M)
        text = text.replace("    # baselines:", "    baselines:")
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        steps = {step.name: step for step in plan_steps(read_pipeline(path))}
        ce = steps["ce"].config
        assert (ce.lambda_align, ce.lambda_vsd, ce.switch_bridge, ce.cache) == (0, 0, None, None)
        assert ce.student == steps["dpt" if "tinyllava" in name else "student"].config.student
        assert steps["scores"].config.data == "data/test"
        assert steps["page"].config.baselines == [str(ce.out)]


def test_what_another_card_changes():
    proposal = proposal_of("qwen2.5-vl-7b-3b", 24, {24: 6, 48: 1, 80: 0})
    assert changes(proposal, 48) == (
        "leave out `lora`, `learning_rate`, `teacher_quantization`; 11.0 GB at the most"
    )
    assert changes(proposal, 80).startswith("leave out `student_dtype`, ")
    assert changes(proposal, 24) == "the same settings; 11.0 GB at the most"


# ---- the command


def test_the_help_says_what_the_sum_takes():
    """It is written out there, so that `--help` need not import what computes it."""
    options = get_type_hints(init_command, include_extras=True)
    defaults = {name: one.default for name, one in inspect.signature(init_command).parameters.items()}

    def text(name: str) -> str:
        return options[name].__metadata__[0].help

    assert get_args(get_args(options["card"])[0]) == tuple(map(str, CARDS)) == tuple(map(str, TFLOPS))
    assert "{}, {}, {} at {}, {}, {} GB".format(*TFLOPS.values(), *TFLOPS) in text("tflops")
    assert f"or {Assumed.samples}." in text("samples")
    assert _MOST_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    assert defaults["picture"] == f"{Assumed.width}x{Assumed.height}"
    assert (defaults["text_tokens"], defaults["answer_tokens"]) == (Assumed.text, Assumed.answers)


def test_the_list_needs_no_model():
    result = run("--list", "--json")
    found = {pair["name"]: pair for pair in json.loads(result.stdout)}
    assert found.keys() == PAIRS.keys()
    assert found["qwen3-vl-8b-2b"]["switch"] == "none"
    words = run("--list").stdout
    assert "--switch-bridge" in words
    assert "not run: the published shapes were tested" in " ".join(words.split())


def test_what_cannot_be_meant_is_refused(tmp_path):
    assert "cachekd init --list" in error_of()
    assert "no folder" in error_of("qwen3-vl-8b-2b")
    assert "there is no such preset" in error_of("qwen9", tmp_path)
    assert "add --student" in error_of("--teacher", "a", tmp_path)
    assert "the folder alone" in error_of("qwen3-vl-8b-2b", tmp_path, "--teacher", "a", "--student", "b")
    for size in ("640", "0x480", "-1x-1", "65536x65536", f"9x{'9' * 4301}"):
        assert "no size of a picture" in error_of("qwen3-vl-8b-2b", tmp_path, "--picture", size)
    assert "more answer tokens" in error_of("qwen3-vl-8b-2b", tmp_path, "--answer-tokens", 300)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "pipeline.yaml").write_text("mine")
    assert "nothing is overwritten" in error_of("qwen3-vl-8b-2b", tmp_path)
    assert (tmp_path / "pipeline.yaml").read_text() == "mine"


def test_a_folder_that_cannot_be_is_refused_before_a_step_is_reckoned(tmp_path, monkeypatch):
    monkeypatch.setattr("cachekd.presets.proposal.propose", lambda *args, **settings: pytest.fail("too late"))
    (tmp_path / "file").write_text("mine")
    assert "file" in error_of("qwen3-vl-8b-2b", tmp_path / "file")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, teacher_path, student_path):
    folder = tmp_path_factory.mktemp("pair")
    data, test = write_llava_json(folder / "train", 12), write_llava_json(folder / "test", 4)
    records = json.loads(test.read_text())
    for record in records:
        record["conversations"] = record["conversations"][:2]
    test.write_text(json.dumps(records))
    narrow = save_vlm(folder / "narrow", tiny_processor(), vision_width=16)
    other = shape_processor("vicuna")
    return SimpleNamespace(
        teacher=teacher_path,
        student=student_path,
        narrow=narrow,
        other=save_vlm(folder / "other", other, vocab_size=len(other.tokenizer)),
        data=data,
        test=test,
    )


@pytest.mark.parametrize(
    ("student", "losses"),
    [("student", {}), ("narrow", {"switch_bridge": "linear"}), ("other", {"align_vocabulary": "cells"})],
)
def test_any_two_models(tmp_path, pair, student, losses):
    name = getattr(pair, student)
    words = ("--teacher", pair.teacher, "--student", name, "--data", pair.data)
    result = run(*words, tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["losses"] == losses
    assert found["assumed"]["samples"] == 12
    assert found["cache_bytes"] == 12 * 100 * 112
    assert found["models"]["teacher"]["image_tokens"] == 16
    assert set(found["cards"]) == {"24", "48", "80"}
    assert all(card["fits"] for card in found["cards"].values())
    steps = plan_steps(read_pipeline(Path(found["file"])))
    assert [step.name for step in steps] == ["cache", "student", "page"]
    check_steps(steps)  # as `cachekd run` does before it begins


def test_the_file_says_the_command_that_writes_it_again(tmp_path, pair):
    """With every option that its sums depend on, so that the second file is the first."""
    words = ["--teacher", pair.teacher, "--student", pair.student, "--card", "48", "--tflops", 70]
    words += ["--samples", 5000, "--picture", "64x32", "--text-tokens", 90, "--answer-tokens", 40]
    assert run(*words, tmp_path / "run").exit_code == 0
    first = (tmp_path / "run" / "pipeline.yaml").read_text()
    [command] = [line for line in first.splitlines() if line.startswith("# Written by: cachekd init ")]
    (tmp_path / "run" / "pipeline.yaml").unlink()
    assert run(*shlex.split(command)[5:]).exit_code == 0
    assert (tmp_path / "run" / "pipeline.yaml").read_text() == first
    assert "million parameters" in first
    assert "0.00 billion" not in first


def test_data_are_counted_where_they_are_on_this_disk(tmp_path, pair):
    write_tar(tmp_path / "a-0.tar", tar_members(2))
    write_tar(tmp_path / "a-1.tar", tar_members(3, start=2))
    assert count_of(str(pair.data)) == 12
    assert (
        count_of(str(tmp_path))
        == count_of(f"{tmp_path}/a-*.tar")
        == count_of(f"{tmp_path}/a-{{0..1}}.tar")
        == 5
    )
    for elsewhere in (
        f"{tmp_path}/b-*.tar",
        str(tmp_path / "none.json"),
        "org/name?split=train",
        "s3://x/y.tar",
    ):
        assert count_of(elsewhere) is None
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CachekdError, match="not valid JSON"):
        count_of(str(tmp_path / "bad.json"))
    words = ("--teacher", pair.teacher, "--student", pair.student, "--data", "org/name")
    assert "org/name is not on this disk, and not counted: 100,000" in " ".join(
        run(*words, tmp_path).output.split()
    )


@pytest.mark.slow
@pytest.mark.parametrize("student", ["student", "narrow", "other"])
def test_what_was_written_runs_from_the_dump_to_the_report(tmp_path, pair, student):
    out = tmp_path / "run"
    words = ("--teacher", pair.teacher, "--student", getattr(pair, student), "--data", pair.data)
    result = run(*words, "--test-data", pair.test, out)
    assert result.exit_code == 0, result.output
    assert "wrote" in result.stdout
    done = CliRunner().invoke(app, ["run", str(out / "pipeline.yaml")])
    assert done.exit_code == 0, done.output
    assert (out / "page" / "report.html").exists()
    summary = json.loads((out / "student" / "cachekd_run.json").read_text())
    assert summary["config"]["data"] == str(pair.data)
    assert yaml.safe_load((out / "pipeline.yaml").read_text())["out"] == str(out)
