"""Pipelines: what is finished is skipped, what changed is redone with what follows, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from filelock import FileLock, Timeout
from typer.testing import CliRunner

from cachekd.cache.tail.sketch import read_sketch
from cachekd.config import DataOptions
from cachekd.config.base import YamlFile
from cachekd.config.fields import PARTS
from cachekd.data import open_samples
from cachekd.errors import CachekdError
from cachekd.evaluate.questions import require_single_questions
from cachekd.models import model_content
from cachekd.paths import EVALUATIONS_FOLDER, RUN_FILE, is_hub_data
from cachekd.pipeline import look, plan_steps, read_pipeline, run_pipeline
from cachekd.pipeline.run import LOCK_FILE
from cachekd.pipeline.state import STATE_FILE
from cachekd.train import inputs
from cachekd_cli.demo import IMAGES
from cachekd_cli.main import app
from cachekd_cli.run import runners
from caches import ROOT, of_an_earlier_version, times_of
from launch import Command
from tiny import save_vlm, tar_members, tiny_processor, write_tar


@pytest.fixture
def values(tmp_path, teacher_path, student_path, data_path) -> dict[str, Any]:
    return {
        "out": str(tmp_path / "pipe"),
        "defaults": {
            "teacher": str(teacher_path),
            "student": str(student_path),
            "data": str(data_path),
            "train": {"batch_size": 6, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 0},
        },
        "steps": [
            {"step": "dump", "name": "cache", "batch_size": 4},
            {"step": "train", "name": "dpt", "stage": "dpt"},
            {"step": "train", "name": "sft", "stage": "sft"},
            {"step": "train", "name": "dft", "stage": "dft"},
            {"step": "eval", "name": "scores", "data": str(data_path), "batch_size": 64},
            {"step": "report", "name": "page", "baselines": ["sft"]},
        ],
    }


def read(values: dict[str, Any], tmp_path: Path) -> Any:
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return read_pipeline(path)


def run(pipeline: Any, **others: Any) -> list[str]:
    """Runs it; returns the steps that really ran."""
    ran: list[str] = []
    states = run_pipeline(pipeline, runners(quiet=True) | others, lambda begun: ran.append(begun.step.name))
    assert {state.state for state in states} == {"done"}
    return ran


def states(pipeline: Any) -> dict[str, str]:
    return {state.name: state.state for state in look(pipeline)}


# ---- what a file says


def test_nothing_is_typed_twice(values, tmp_path):
    steps = {step.name: step for step in plan_steps(read(values, tmp_path))}
    out, defaults = Path(values["out"]), values["defaults"]
    assert steps["cache"].config.teacher == defaults["teacher"]
    assert steps["cache"].config.batch_size == 4  # the trainer's 6 is not the dump's
    assert steps["dpt"].config.student == defaults["student"]
    assert steps["sft"].config.student == str(out / "dpt")
    assert steps["dft"].config.student == str(out / "sft")
    assert (steps["sft"].config.cache, steps["sft"].config.teacher) == (None, None)  # L_CE needs neither
    assert (steps["dpt"].config.cache, steps["dpt"].config.teacher) == (str(out / "cache"), None)
    assert (steps["dft"].config.cache, steps["dft"].config.teacher) == (
        str(out / "cache"),
        defaults["teacher"],
    )
    assert {steps[name].config.learning_rate for name in ("dpt", "sft", "dft")} == {1e-3}
    assert steps["scores"].config.models == [str(out / name) for name in ("dpt", "sft", "dft")]
    assert steps["page"].config.run == str(out / "dft")
    assert steps["sft"].upstream == ("dpt",)
    assert set(steps["dft"].upstream) == {"sft", "cache"}
    assert set(steps["page"].upstream) == {"dft", "sft", "scores"}


def test_what_is_said_of_data_is_said_once(values, tmp_path, data_path):
    values["defaults"] |= {"key": "uid", "on_error": "skip", "max_tokens": 99, "limit": 7, "shuffle_seed": 3}
    values["defaults"]["train"]["missing"] = "skip"
    values["steps"][1]["data"] = str(data_path)  # dpt has data of its own
    values["steps"][4]["max_tokens"] = 50
    planned = {step.name: step.config for step in plan_steps(read(values, tmp_path))}
    for name in ("cache", "dpt", "sft", "dft", "scores"):
        assert (planned[name].key, planned[name].on_error) == ("uid", "skip")
    for name in ("cache", "sft", "dft"):
        assert (planned[name].limit, planned[name].shuffle_seed, planned[name].max_tokens) == (7, 3, 99)
    for name in ("dpt", "scores"):
        assert (planned[name].limit, planned[name].shuffle_seed) == (None, None)
    assert (planned["dpt"].max_tokens, planned["scores"].max_tokens) == (99, 50)


def test_a_steps_own_setting_then_its_stage_then_defaults(values, tmp_path):
    values["defaults"]["train"] |= {"lambda_align": 0.5, "temperature": 2.0, "trainable": "language_model"}
    values["defaults"]["train"] |= {"lambda_vsd": 0}
    values["steps"][2] |= {"trainable": ["language_model"]}
    values["steps"].insert(4, {"step": "train", "name": "plain", "student": "dpt"})
    steps = {step.name: step.config for step in plan_steps(read(values, tmp_path))}
    assert steps["sft"].trainable == ("language_model",)
    assert steps["sft"].lambda_align == 0.0
    assert (steps["dft"].trainable, steps["dft"].lambda_align) == (PARTS, 1.0)
    assert (steps["plain"].trainable, steps["plain"].lambda_align) == (("language_model",), 0.5)
    assert steps["plain"].student == str(Path(values["out"]) / "dpt")
    assert {steps[name].temperature for name in ("dpt", "dft", "plain")} == {2.0}


def test_whose_student_a_step_trains_is_said_or_follows_from_its_stage(short, tmp_path, student_path):
    del short["steps"][1]["stage"]
    short["steps"][1] |= {"lambda_align": 0, "lambda_vsd": 0}
    with pytest.raises(CachekdError, match="not said which student") as caught:
        plan_steps(read(short, tmp_path))
    assert "step 'two'" in str(caught.value.where)
    ways = re.findall(r"`student: (\S+)`", str(caught.value.fix))
    taken = {"one": str(Path(short["out"]) / "one"), str(student_path): str(student_path)}
    assert ways == list(taken)
    for way, student in taken.items():
        short["steps"][1]["student"] = way
        _, two = plan_steps(read(short, tmp_path))
        assert (two.config.student, two.continues) == (student, "one" if way == "one" else None)


def test_a_step_that_ran_out_of_memory_goes_on_in_smaller_batches(short, tmp_path):
    from transformers import TrainerCallback

    from cachekd.train import train

    short["steps"] = short["steps"][:1]
    short["defaults"]["train"] |= {"save_steps": 1, "batch_size": 4, "gradient_accumulation": 1}

    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise CachekdError("out of memory")

    with pytest.raises(CachekdError, match="out of memory"):
        run(read(short, tmp_path), train=lambda config: train(config, [Fail()]))
    short["defaults"]["train"] |= {"batch_size": 2, "gradient_accumulation": 2}
    assert states(read(short, tmp_path)) == {"one": "failed"}
    assert run(read(short, tmp_path)) == ["one"]
    assert json.loads((Path(short["out"]) / "one" / RUN_FILE).read_text())["resumed_from"] == 1
    short["defaults"]["train"] |= {"gradient_accumulation": 3}
    assert states(read(short, tmp_path)) == {"one": "changed"}


@pytest.mark.parametrize(
    ("change", "message", "place"),
    [
        ({"step": "bake"}, "no such step: it is", "step 'dft'"),
        ({"step": "trian"}, r"no such step \(did you mean train\?\)", "step 'dft'"),
        ({"temprature": 3}, "unknown setting 'temprature'", "step 'dft'"),
        ({"temperature": -1}, "'temperature': input should be greater than 0", "step 'dft'"),
        ({"out": "elsewhere"}, "unknown setting 'out'", "step 'dft'"),
        ({"name": "a/b"}, "a name is made of", "step 'a/b'"),
        ({"name": "sft"}, "two steps are called 'sft'", "pipeline.yaml"),
        ({"trainable": "projector"}, "L_VSD would have no gradient", "step 'dft'"),
        ({"trainable": ["projector", "hat"]}, "'trainable.1'", "step 'dft'"),
    ],
)
def test_what_is_wrong_is_said_with_its_step(values, tmp_path, change, message, place):
    values["steps"][3] |= change
    with pytest.raises(CachekdError, match=message) as caught:
        plan_steps(read(values, tmp_path))
    assert place in str(caught.value.where)


def test_every_mistake_in_a_file_is_said_with_its_line_and_what_may_have_been_meant(values, tmp_path):
    values["steps"][3] |= {"temprature": 3, "epochs": -1}
    values["defaults"] |= {"taecher": "t"}
    values["defaults"]["train"] |= {"windw": 8}
    values["steps"][4] |= {"step": "evaluate"}
    values["outt"] = values["out"]
    with pytest.raises(CachekdError) as caught:
        read(values, tmp_path)
    first, *lines = caught.value.problem.splitlines()
    assert first == "6 settings are wrong:"
    for near in ("temperature", "teacher", "window", "out"):
        assert sum(f"(did you mean {near!r}?)" in line for line in lines) == 1
    text = (tmp_path / "pipeline.yaml").read_text().splitlines()
    for line in lines:
        number = int(line.split("pipeline.yaml, line ")[1].split(",")[0])
        wrong = next(w for w in ("temprature", "epochs", "taecher", "windw", "evaluate", "outt") if w in line)
        assert wrong in text[number - 1] or text[number - 1].strip().startswith("- ")
    assert sum("step 'dft'" in line for line in lines) == 2


def test_what_is_missing_in_several_steps_is_said_at_once(values, tmp_path):
    del values["defaults"]["teacher"], values["defaults"]["data"]
    del values["steps"][4]["data"]
    with pytest.raises(CachekdError) as caught:
        plan_steps(read(values, tmp_path))
    lines = caught.value.problem.splitlines()[1:]
    steps = [line.rpartition("step ")[2] for line in lines if "'data': field required" in line]
    assert steps == ["'cache'", "'dpt'", "'sft'", "'dft'", "'scores'"]
    assert any("'teacher': field required, step 'cache'" in line for line in lines)


def test_a_typo_is_refused_before_torch_is_loaded(tmp_path):
    """And before transformers: in `run`, in a plan whose setting is missing, and in the other commands."""
    pipeline, recipe = tmp_path / "pipeline.yaml", tmp_path / "run.yaml"
    pipeline.write_text("out: o\nsteps: [{step: dump, name: a, teacher: t}]\n")
    recipe.write_text("student: s\ndata: d\nout: o\nlearning_rat: 1\n")
    code = f"""
import sys
from typer.testing import CliRunner
from cachekd_cli.main import app
for command in (
    ["run", {str(pipeline)!r}],
    ["train", "--config", {str(recipe)!r}],
    ["dump", "--teacher", "t", "--data", "d", "--out", "o", "--top-k", "0"],
    ["dump", "--teacher", "t", "--data", "d", "--out", "o", "--tail", "byte=64"],
    ["eval", "m", "--data", "d", "--limit", "0"],
):
    problem = CliRunner().invoke(app, command).exception.problem
    print(problem, "torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert [line.split("'")[1] for line in said] == ["data", "learning_rat", "top_k", "tail", "limit"]
    assert all(line.endswith("False False") for line in said)


def test_what_no_one_says_is_asked_for(values, tmp_path):
    del values["steps"][0]
    with pytest.raises(CachekdError, match="cached logits") as caught:
        plan_steps(read(values, tmp_path))
    assert "step 'dpt'" in caught.value.where
    del values["defaults"]["data"]
    with pytest.raises(CachekdError, match="'data'") as caught:
        plan_steps(read(values, tmp_path))
    assert "or in `defaults`" in caught.value.fix


def test_the_demos_pipeline_is_the_demo(monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = {
        step.name: step.config for step in plan_steps(read_pipeline(Path("examples/easy_vqa/pipeline.yaml")))
    }
    recipe = YamlFile.read(Path("examples/easy_vqa/recipe.yaml")).values
    for name in ("ce", "switch-kd"):
        assert {setting: getattr(steps[name], setting) for setting in recipe} == recipe
    assert steps["ce"].student == steps["switch-kd"].student == "examples/easy_vqa/student"
    assert steps["ce"].limit == steps["cache"].limit == IMAGES
    assert (steps["ce"].distils, steps["switch-kd"].lambda_vsd) == (False, 1.0)


# ---- what is run


def test_only_what_changed_is_redone_and_what_was_there_is_kept(values, tmp_path):
    out = Path(values["out"])
    values["steps"] = values["steps"][:4]
    pipeline = read(values, tmp_path)
    assert set(states(pipeline).values()) == {"waiting"}
    assert not out.exists()  # looking writes nothing
    assert run(pipeline) == ["cache", "dpt", "sft", "dft"]
    before = times_of(out)
    assert run(pipeline) == []
    assert {name: t for name, t in times_of(out).items() if name in before} == before

    values["steps"][2]["learning_rate"] = 2e-3
    values["steps"][2]["logit_chunk"] = 7  # what does not change the numbers
    changed = read(values, tmp_path)
    found = {state.name: state for state in look(changed)}
    assert [found[name].state for name in found] == ["done", "done", "changed", "changed"]
    assert found["sft"].why == "learning_rate 0.001 -> 0.002"
    assert found["dft"].why == "step sft is to be redone"
    assert run(changed) == ["sft", "dft"]
    after = times_of(out)
    for name, when in before.items():
        step, _, rest = name.partition("/")
        if step in ("cache", "dpt"):
            assert after[name] == when
        elif rest:
            assert after[f"{step}.old-1/{rest}"] == when
    assert json.loads((out / "sft" / RUN_FILE).read_text())["config"]["learning_rate"] == 2e-3
    assert run(changed) == []


@pytest.fixture
def short(values) -> dict[str, Any]:
    """Two train steps by L_CE alone."""
    values["steps"] = [
        {"step": "train", "name": "one", "stage": "sft"},
        {"step": "train", "name": "two", "stage": "sft"},
    ]
    return values


def test_a_failed_step_says_how_to_go_on_and_is_gone_on_with(short, tmp_path):
    pipeline = read(short, tmp_path)

    def fails_once(config: Any) -> None:
        if config.out.name == "two":
            raise CachekdError("out of memory", where="stage two", fix="--batch-size 1")
        runners(quiet=True)["train"](config)

    with pytest.raises(CachekdError, match="out of memory") as caught:
        run(pipeline, train=fails_once)
    assert caught.value.where == "step 'two': stage two"
    assert caught.value.fix.startswith("--batch-size 1; then run the same command again")
    assert states(pipeline) == {"one": "done", "two": "failed"}
    assert look(pipeline)[1].text == "failed: out of memory"
    assert run(pipeline) == ["two"]


def test_an_interrupted_step_goes_on_from_its_checkpoint(short, tmp_path):
    from transformers import TrainerCallback

    from cachekd.train import train

    short["defaults"]["train"]["save_steps"] = 1

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    pipeline = read(short, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, train=lambda config: train(config, [Stop()]))
    assert states(pipeline) == {"one": "interrupted", "two": "waiting"}
    with FileLock(Path(short["out"]) / LOCK_FILE):
        assert states(pipeline) == {"one": "running", "two": "waiting"}
    assert run(pipeline) == ["one", "two"]
    assert json.loads((Path(short["out"]) / "one" / RUN_FILE).read_text())["resumed_from"] == 1


def test_other_files_under_the_same_name_are_noticed(short, tmp_path, student_path):
    data = tmp_path / "data"
    write_tar(data / "0.tar", tar_members(6))
    student = shutil.copytree(student_path, tmp_path / "student")
    short["defaults"] |= {"data": str(data), "student": str(student)}
    short["steps"][1]["student"] = str(student_path)
    pipeline = read(short, tmp_path)
    run(pipeline)
    os.utime(data / "0.tar")  # copied, say: not another data set
    assert states(pipeline) == {"one": "done", "two": "done"}
    weights = student / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert states(pipeline) == {"one": "changed", "two": "done"}
    assert look(pipeline)[0].why == f"files of {student} changed"
    weights.write_bytes(content)
    assert states(pipeline) == {"one": "done", "two": "done"}
    write_tar(data / "0.tar", tar_members(5))
    assert {state.why for state in look(pipeline)} == {f"content of {data} changed"}


def test_a_gguf_file_is_a_model(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF one")
    one = model_content(str(file))
    file.write_bytes(b"GGUF another")
    assert one != model_content(str(file))


def test_another_cache_under_the_same_name_is_noticed(short, tmp_path, cache_path):
    """A cache that no step makes."""
    cache = shutil.copytree(cache_path, tmp_path / "given")
    short["steps"] = [{"step": "train", "name": "one", "stage": "dpt", "epochs": 1, "cache": str(cache)}]
    pipeline = read(short, tmp_path)
    assert run(pipeline) == ["one"]
    assert states(pipeline) == {"one": "done"}
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest, indent=3))
    (state,) = look(pipeline)
    assert (state.state, state.why) == ("changed", f"content of {cache / 'manifest.json'} changed")


def test_done_is_what_has_its_whole_output(short, tmp_path):
    pipeline = read(short, tmp_path)
    run(pipeline)
    path = Path(short["out"]) / STATE_FILE
    record = json.loads(path.read_text())
    record["steps"]["two"]["state"] = "begun"  # killed when all was written but this
    path.write_text(json.dumps(record))
    assert run(pipeline) == []
    assert json.loads(path.read_text())["steps"]["two"]["state"] == "done"

    shutil.rmtree(Path(short["out"]) / "one")
    assert [state.text for state in look(pipeline)] == [
        "changed: its output is gone",
        "changed: step one is to be redone",
    ]
    assert run(pipeline) == ["one", "two"]
    assert (Path(short["out"]) / "two.old-1" / RUN_FILE).exists()


def test_a_damaged_run_is_refused_and_done_again_when_it_is_moved_away(short, tmp_path):
    pipeline = read(short, tmp_path)
    run(pipeline)
    one = Path(short["out"]) / "one"
    (one / EVALUATIONS_FOLDER).mkdir()  # what comes and goes later is no damage
    shutil.rmtree(one / "checkpoints", ignore_errors=True)
    assert run(pipeline) == []
    content = (one / "model.safetensors").read_bytes()
    (one / "model.safetensors").write_bytes(content[:-1])
    assert look(pipeline)[0].text.startswith("damaged: model.safetensors has ")
    (one / "model.safetensors").unlink()
    assert states(pipeline) == {"one": "damaged", "two": "done"}
    before = times_of(Path(short["out"]))
    with pytest.raises(CachekdError, match="output is damaged") as caught:
        run(pipeline)
    assert caught.value.where == f"step 'one': {one}"
    assert caught.value.found == "model.safetensors is missing"
    assert "move the folder away" in caught.value.fix
    assert times_of(Path(short["out"])) == before
    (one / "model.safetensors").write_bytes(content)
    assert run(pipeline) == []
    (one / "tokenizer.json").unlink()
    one.rename(one.with_name("one.broken"))
    assert run(pipeline) == ["one", "two"]


def test_a_damaged_cache_is_refused(values, tmp_path):
    values["steps"] = values["steps"][:1]
    pipeline = read(values, tmp_path)
    run(pipeline)
    shard = next((Path(values["out"]) / "cache" / "shards").iterdir())
    shard.unlink()
    (state,) = look(pipeline)
    assert state.text == f"damaged: shards/{shard.name} is missing"
    with pytest.raises(CachekdError, match="damaged") as caught:
        run(pipeline)
    assert "cachekd verify" in caught.value.fix
    shard.write_bytes(b"cut")
    (state,) = look(pipeline)
    assert state.text.startswith(f"damaged: shards/{shard.name} has 3 bytes, not ")


def test_a_file_in_a_steps_place_is_moved_aside(short, tmp_path):
    short["steps"] = short["steps"][:1]
    pipeline = read(short, tmp_path)
    run(pipeline)
    one = Path(short["out"]) / "one"
    shutil.rmtree(one)
    one.write_text("notes")
    assert run(pipeline) == ["one"]
    assert one.with_name("one.old-1").read_text() == "notes"


def test_a_step_that_failed_after_its_output_was_whole_is_done(short, tmp_path):
    def cannot_print(config: Any) -> None:
        runners(quiet=True)["train"](config)
        raise BrokenPipeError

    pipeline = read(short, tmp_path)
    with pytest.raises(BrokenPipeError):
        run(pipeline, train=cannot_print)
    assert states(pipeline) == {"one": "done", "two": "waiting"}
    assert run(pipeline) == ["two"]


@pytest.mark.parametrize(
    ("step", "change", "message", "where"),
    [
        (3, {"training": {"optm": "adamw_torch"}}, "cannot be set", "step 'dft': setting 'training.optm'"),
        (3, {"lora": {"rr": 4}}, "peft refuses", "step 'dft': setting 'lora'"),
        (3, {"student_quantization": {"load_in_4bit": True}}, "quantised weights", "step 'dft': setting"),
        (3, {"teacher_device_map": "nope.yaml"}, "no such device map", "step 'dft': nope.yaml"),
        (0, {"device_map": "nope.yaml"}, "no such device map", "step 'cache': nope.yaml"),
        (3, {"student": "nope"}, "no such step or model", "step 'dft': nope"),
        (3, {"student": "models/nope"}, "no model can be loaded", "step 'dft': models/nope"),
        (3, {"cache": "nope"}, "not a cache", "step 'dft': nope"),
        (3, {"binding": "nope.json"}, "cannot be read", "step 'dft': nope.json"),
        (4, {"models": ["dpt", "nope"]}, "no such step or model", "step 'scores': nope"),
        (4, {"data": "nodata"}, "the data set does not exist", "step 'scores': nodata"),
        (4, {"data": "no/data"}, "cannot be (loaded|reached)", "step 'scores': no/data"),
        (4, {"data": "memory://no/x.tar"}, "does not exist", "step 'scores': memory://no/x.tar"),
        (5, {"run": "cache"}, "not a run", "step 'page': cache"),
        (5, {"baselines": ["nope"]}, "not a run", "step 'page': nope"),
    ],
)
def test_what_a_later_step_would_fail_of_is_said_first(
    values, tmp_path, monkeypatch, step, change, message, where
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nobody waits for a hub here
    values["steps"][step] |= change
    pipeline = read(values, tmp_path)
    began: list[str] = []
    with pytest.raises(CachekdError, match=message) as caught:
        run_pipeline(pipeline, runners(quiet=True), lambda begun: began.append(begun.step.name))
    assert caught.value.where.startswith(where)
    assert began == []
    assert not Path(values["out"]).exists()


def test_a_teacher_that_is_quantised_in_the_dump_alone_is_said_first(values, tmp_path):
    pytest.importorskip("bitsandbytes")
    values["steps"][0]["quantization"] = "4bit"
    with pytest.raises(CachekdError, match="the cache's teacher was quantised differently") as caught:
        run(read(values, tmp_path))
    assert caught.value.where.startswith("step 'dft': ")
    assert not Path(values["out"]).exists()


def test_models_that_do_not_go_together_are_said_first(values, tmp_path):
    processor = tiny_processor()
    processor.chat_template += "{# another #}"
    other = save_vlm(tmp_path / "other", processor, seed=2)
    values["steps"][1]["student"] = str(other)
    with pytest.raises(CachekdError, match="chat template") as caught:
        run(read(values, tmp_path))
    assert "step 'dpt'" in caught.value.where
    assert not Path(values["out"]).exists()
    wide = save_vlm(tmp_path / "wide", tiny_processor(), vision_width=64)
    values["steps"][1]["student"] = str(wide)
    with pytest.raises(CachekdError, match="cannot be switched") as caught:
        run(read(values, tmp_path))
    assert "step 'dft'" in caught.value.where  # whose student is what the steps above make of it
    assert not Path(values["out"]).exists()


def test_a_cache_that_is_there_is_checked_as_training_does_before_the_first_step(
    values, tmp_path, cache_path, student_path
):
    """Its teacher and its settings of Kneedle; of a live teacher, the chat template."""
    processor = tiny_processor()
    processor.chat_template += "{# another #}"
    other = save_vlm(tmp_path / "other", processor, seed=2)
    given, live = {"cache": str(cache_path)}, {"cache": None, "live_teacher": True}
    for change, message in (
        (given | {"teacher": str(student_path)}, "with a different teacher.s configuration"),
        (given | {"window": 777}, "another Kneedle setting"),
        (live | {"teacher": str(other)}, "teacher and student have different chat templates"),
    ):
        step = {"step": "train", "name": "dft", "stage": "dft", **change}
        values["steps"] = [{"step": "dump", "name": "cache"}, step]
        with pytest.raises(CachekdError, match=message) as caught:
            run(read(values, tmp_path), dump=begun)
        assert "step 'dft'" in str(caught.value.where)


def test_a_student_that_was_trained_before_is_the_teacher_that_its_cache_is_of(short, tmp_path):
    """Not the model that it began from."""
    one = str(Path(short["out"]) / "one")
    short["steps"] = [short["steps"][0], {"step": "dump", "name": "cache", "teacher": one}]
    run(read(short, tmp_path))
    short["steps"].append({"step": "train", "name": "two", "stage": "dft", "teacher": one})
    with pytest.raises(CachekdError, match="the dump is begun") as caught:
        run(read(short, tmp_path), train=begun)
    assert "step 'two'" in str(caught.value.where)


@pytest.mark.parametrize("seen", ["weights", "configuration"])
def test_a_dump_that_will_not_be_of_the_switched_teacher_is_refused_first(
    values, tmp_path, teacher_path, student_path, seen
):
    other = shutil.copytree(teacher_path, tmp_path / "other")
    values["steps"][0]["teacher"] = str(other)
    with pytest.raises(CachekdError, match="the dump is begun"):
        run(read(values, tmp_path), dump=begun)  # the same one at another place
    if seen == "weights":
        save_vlm(other, tiny_processor(), seed=77)
    else:
        text = (other / "config.json").read_text()
        (other / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        assert (other / "config.json").read_text() != text
    with pytest.raises(CachekdError, match="will be of another teacher") as caught:
        run(read(values, tmp_path), dump=begun)
    assert "step 'dft'" in str(caught.value.where)  # the first that switches
    assert (caught.value.expected, caught.value.found) == (str(other), str(teacher_path))


def test_kneedle_of_a_cache_to_be_made_is_compared_first(values, tmp_path):
    values["steps"][0] |= {"window": 64}
    values["steps"][1] |= {"window": 64}
    values["steps"][3] |= {"window": 32}
    with pytest.raises(CachekdError, match="another Kneedle setting") as caught:
        run(read(values, tmp_path), dump=begun)
    assert "step 'dft': setting 'window'" in str(caught.value.where)


def test_a_foreign_folder_of_a_later_step_is_seen_first(values, tmp_path):
    (Path(values["out"]) / "dft").mkdir(parents=True)
    (Path(values["out"]) / "dft" / "thesis.tex").write_text("x")
    with pytest.raises(CachekdError, match="did not make") as caught:
        run(read(values, tmp_path))
    assert "step 'dft'" in caught.value.where
    assert not (Path(values["out"]) / "cache").exists()


def test_data_by_a_pattern_or_with_options_are_opened_once(tmp_path, data_path, monkeypatch):
    opened = []
    monkeypatch.setattr(inputs, "open_samples", lambda *a, **k: opened.append(a) or open_samples(*a, **k))
    Dataset.from_dict({"x": [1]}).save_to_disk(tmp_path / "saved")
    for spec in (f"{data_path}/{{0..1}}.tar", f"{data_path}/*.tar"):
        known: dict[str, Any] = {}
        data = DataOptions(data=spec)
        assert inputs.data_content(data, known) == inputs.data_content(data, known)
    assert len(opened) == 2
    assert not is_hub_data(f"{tmp_path}/saved?split=train")
    monkeypatch.chdir(tmp_path.parent)
    assert not is_hub_data(f"{tmp_path.name}/saved?split=train")
    assert is_hub_data("org/name?split=train")


@pytest.mark.parametrize(
    ("fix", "told"),
    [
        (None, "mend that, and run the same command again: finished steps stay as they are"),
        ("eat less", "eat less; then run the same command again: finished steps stay as they are"),
        ("rest, then run the same command again", "rest, then run the same command again"),
    ],
)
def test_what_to_do_after_a_failure_is_whole(short, tmp_path, fix, told):
    def fails(config: Any) -> None:
        raise CachekdError("no", fix=fix)

    with pytest.raises(CachekdError, match="no") as caught:
        run(read(short, tmp_path), train=fails)
    assert caught.value.fix == told


def test_a_lock_that_a_step_waits_for_is_not_the_pipelines(short, tmp_path):
    def waits(config: Any) -> None:
        raise Timeout("some/other.lock")

    with pytest.raises(Timeout, match="other"):
        run(read(short, tmp_path), train=waits)


def test_a_look_at_the_status_does_not_stop_a_run_that_begins(short, tmp_path):
    short["steps"] = short["steps"][:1]
    lock = FileLock(Path(short["out"]) / LOCK_FILE, thread_local=False)
    Path(short["out"]).mkdir()
    lock.acquire()
    threading.Timer(0.1, lock.release).start()
    assert run(read(short, tmp_path)) == ["one"]


def test_data_that_change_while_a_step_runs_stop_what_takes_its_output(short, tmp_path):
    data = tmp_path / "data"
    write_tar(data / "0.tar", tar_members(6))
    short["steps"][0]["data"] = str(data)

    def meanwhile(config: Any) -> None:
        runners(quiet=True)["train"](config)
        if config.out.name == "one":
            write_tar(data / "0.tar", tar_members(5))

    pipeline = read(short, tmp_path)
    with pytest.raises(CachekdError, match="step 'one', whose output it takes") as caught:
        run(pipeline, train=meanwhile)
    assert caught.value.found == f"changed: content of {data} changed"
    assert run(pipeline) == ["one", "two"]


def test_sketches_on_a_device_go_with_their_step(short, tmp_path, cache_path):
    path = next(cache_path.glob("sketch*"))
    kept = []

    def reads(config: Any) -> None:
        kept.append(weakref.ref(read_sketch(path).to("meta")))
        assert kept[-1]() is not None
        raise CachekdError("no")

    with pytest.raises(CachekdError, match="no"):
        run(read(short, tmp_path), train=reads)
    assert [there() for there in kept] == [None]


def test_missing_inputs_are_missed_before_anything_begins(values, tmp_path):
    values["steps"][4]["data"] = str(tmp_path / "no" / "data")
    pipeline = read(values, tmp_path)
    with pytest.raises(CachekdError, match="does not exist") as caught:
        run(pipeline)
    assert "step 'scores'" in caught.value.where
    assert not Path(values["out"]).exists()


def test_a_folder_of_something_else_and_a_damaged_state_are_left_alone(short, tmp_path):
    out = Path(short["out"])
    (out / "one").mkdir(parents=True)
    (out / "one" / "thesis.tex").write_text("x")
    pipeline = read(short, tmp_path)
    with pytest.raises(CachekdError, match="did not make"):
        run(pipeline)
    assert (out / "one" / "thesis.tex").read_text() == "x"
    (out / STATE_FILE).write_text("{")
    with pytest.raises(CachekdError, match="state cannot be read"):
        run(pipeline)


def test_one_process_runs_a_pipeline(short, tmp_path, monkeypatch):
    pipeline = read(short, tmp_path)
    Path(short["out"]).mkdir()
    with FileLock(Path(short["out"]) / LOCK_FILE), pytest.raises(CachekdError, match="another process"):
        run(pipeline)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CachekdError, match="one process"):
        run(pipeline)


def test_the_command(short, tmp_path):
    read(short, tmp_path)
    command = ["run", str(tmp_path / "pipeline.yaml")]
    shown = CliRunner().invoke(app, [*command, "--status", "--json"])
    assert [step["state"] for step in json.loads(shown.stdout)] == ["waiting", "waiting"]
    assert [step["continues"] for step in json.loads(shown.stdout)] == [None, "one"]
    assert "train, from one" in CliRunner().invoke(app, [*command, "--status"]).stdout
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("wall time") == 2
    assert shown.stderr.count("goes on with the student of step 'one'") == 1
    shown = CliRunner().invoke(app, [*command, "--json"])
    assert [(step["name"], step["state"]) for step in json.loads(shown.stdout)] == [
        ("one", "done"),
        ("two", "done"),
    ]
    assert "pipeline.yaml" in CliRunner().invoke(app, ["run", "--help"]).stdout


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_pipeline_goes_on(values, tmp_path, sent):
    if sent == signal.SIGTERM:  # the rest is as after SIGKILL
        values["steps"] = values["steps"][:2]
    values["steps"][1] |= {"epochs": 10}
    values["defaults"]["train"]["save_steps"] = 5
    pipeline = read(values, tmp_path)
    out = Path(values["out"])
    command = ["run", str(tmp_path / "pipeline.yaml")]
    process = Command(*command)
    deadline = time.monotonic() + 120
    while not list(out.glob("dpt/checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(120) == (-sent if sent == signal.SIGKILL else 128 + sent)
    waiting = {step["name"]: "waiting" for step in values["steps"][2:]}
    assert states(pipeline) == {"cache": "done", "dpt": "interrupted"} | waiting
    before = times_of(out / "cache")
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output[-3000:]
    assert {step["state"] for step in json.loads(done.stdout)} == {"done"}
    assert times_of(out / "cache") == before
    assert json.loads((out / "dpt" / RUN_FILE).read_text())["resumed_from"] >= 5
    assert not list(out.glob("*.old-*"))
    if sent == signal.SIGTERM:
        return
    scores = json.loads((out / "scores" / "scores.json").read_text())
    assert [Path(score["name"]).name for score in scores["models"]] == ["dpt", "sft", "dft"]
    page = (out / "page" / "report.html").read_text()
    assert "dft" in page
    assert "sft" in page


# ---- samples that a dump leaves out


@pytest.mark.parametrize(
    ("dump", "train", "message"),
    [
        ({"on_error": "skip"}, {}, r"the dump may leave samples out[\s\S]*missing: skip"),
        ({"too_long": "skip"}, {}, r"the dump may leave samples out"),
        (
            {"on_error": "skip"},
            {"missing": "ce-only"},
            r"this step would stop at them[\s\S]*missing: ce-only with on_error: skip",
        ),
        (
            {"too_long": "skip"},
            {"missing": "ce-only", "too_long": "error"},
            r"this step would stop at them[\s\S]*too_long: skip there",
        ),
        ({"limit": 4}, {}, r"will lack samples[\s\S]*8 others of 12[\s\S]*limit is 4 there and None here"),
        (
            {"limit": 4},
            {"limit": 4, "shuffle_seed": 1},
            r"will lack samples[\s\S]*shuffle_seed is None there",
        ),
        ({"key": "index"}, {}, r"will lack samples[\s\S]*key is index there and None here"),
    ],
)
def test_samples_that_a_dump_will_not_have_are_missed_before_the_first_step(
    values, tmp_path, dump, train, message
):
    values["steps"][0] |= dump
    values["steps"][3] |= train
    values["steps"][1] |= {"missing": "skip"}
    with pytest.raises(CachekdError, match=message) as caught:
        run(read(values, tmp_path))
    assert "step 'dft'" in str(caught.value.where)
    assert not Path(values["out"]).exists()


def test_a_pipeline_that_leaves_samples_out_runs_through(values, tmp_path, broken_data):
    """Bad ones, which the dump finds; beyond its limit; and in the evaluation."""
    values["defaults"] |= {"data": str(broken_data), "on_error": "skip"}
    values["defaults"]["train"] |= {"missing": "skip"}
    values["steps"] = [values["steps"][index] for index in (0, 1, 4)]
    values["steps"][0] |= {"limit": 10}
    values["steps"][1] |= {"limit": 12}
    values["steps"][2] |= {"data": str(broken_data)}
    assert run(read(values, tmp_path)) == ["cache", "dpt", "scores"]
    left_out = json.loads((Path(values["out"]) / "dpt" / RUN_FILE).read_text())["left_out"]
    assert {*left_out["missing"]["first"]} == {"s007", "s010", "s011"}
    scores = json.loads((Path(values["out"]) / "scores" / "scores.json").read_text())
    assert scores["asked"]["left_out"]["samples"] == 7
    # What is there is asked, not what might have been.
    values["steps"][1] |= {"missing": "error"}
    with pytest.raises(
        CachekdError, match=r"3 are missing, the first is 's007'; the dump left 1 out"
    ) as caught:
        run(read(values, tmp_path))
    assert "step 'dpt'" in str(caught.value.where)
    values["steps"][1] |= {"missing": "ce-only", "on_error": "stop"}
    with pytest.raises(CachekdError, match=r"would stop at them[\s\S]*1 of them, such as 's007'"):
        run(read(values, tmp_path))


@pytest.mark.parametrize(
    ("dump", "train"), [({"on_error": "skip"}, {"on_error": "skip"}), ({"too_long": "skip"}, {})]
)
def test_a_step_that_leaves_out_what_its_dump_does_is_begun(values, tmp_path, dump, train):
    """L_CE alone for what the cache lacks; the dump's lengths are the step's own, unless it says others."""
    values["steps"][0] |= dump
    for step in values["steps"][1:4]:
        step |= {"missing": "ce-only"} | train

    with pytest.raises(CachekdError, match="the dump is begun"):
        run(read(values, tmp_path), dump=begun)


def test_data_without_a_picture_are_refused_before_the_first_step(values, tmp_path):
    data = tmp_path / "text.json"
    turns = [{"from": "human", "value": "what is the color?"}, {"from": "gpt", "value": "red"}]
    data.write_text(json.dumps([{"id": str(index), "conversations": turns} for index in range(4)]))
    values["defaults"]["data"] = str(data)
    with pytest.raises(CachekdError, match="no sample feeds L_VSD") as caught:
        run(read(values, tmp_path))
    assert "step 'dft'" in str(caught.value.where)
    assert not Path(values["out"]).exists()


# ---- held-out data


def test_held_out_data_and_their_cache_are_inputs_of_a_train_step(values, tmp_path, teacher_path):
    held_out = tmp_path / "held-out"
    write_tar(held_out / "0.tar", tar_members(4, start=40))
    values["defaults"] |= {"key": "__key__", "limit": 9}
    values["defaults"]["train"] |= {"eval_data": {"data": str(held_out), "limit": 3}, "eval_cache": "held"}
    values["steps"] = [
        {"step": "dump", "name": "cache"},
        {"step": "dump", "name": "held", "data": str(held_out)},
        {"step": "train", "name": "sft", "stage": "sft"},
        {"step": "train", "name": "dpt", "stage": "dpt"},
    ]
    pipeline = read(values, tmp_path)
    planned = {step.name: step for step in plan_steps(pipeline)}
    out = Path(values["out"])
    dpt = planned["dpt"].config
    assert (dpt.cache, dpt.eval_cache) == (str(out / "cache"), str(out / "held"))  # not the last dump
    assert set(planned["dpt"].upstream) == {"sft", "cache", "held"}
    assert planned["sft"].config.eval_cache is None  # L_CE needs none
    held = planned["dpt"].data["eval_data"]
    assert (held.key, held.limit) == ("__key__", 3)
    del values["defaults"]["key"]
    pipeline = read(values, tmp_path)
    assert run(pipeline) == ["cache", "held", "sft", "dpt"]
    log = json.loads((out / "dpt" / RUN_FILE).read_text())["log"]
    assert {"eval_ce", "eval_align", "eval_token_accuracy"} <= set().union(*log)
    assert set(states(pipeline).values()) == {"done"}
    members = [(name, body.replace(b"what", b"which")) for name, body in tar_members(4, start=40)]
    write_tar(held_out / "0.tar", members)
    found = {state.name: state for state in look(pipeline)}
    assert found["cache"].state == "done"
    assert found["sft"].state == "changed"
    assert f"content of eval_data {held_out} changed" in found["sft"].why


def test_held_out_data_that_a_later_step_would_fail_of_are_said_first(values, tmp_path, data_path):
    held_out = tmp_path / "held-out"
    write_tar(held_out / "0.tar", tar_members(4, start=40))
    values["defaults"]["train"] |= {"eval_data": str(held_out), "eval_cache": "cache"}  # of other data
    values["steps"] = values["steps"][:4]
    with pytest.raises(CachekdError, match="lack samples") as caught:
        run(read(values, tmp_path))
    assert "step 'dpt': setting 'eval_cache'" in str(caught.value.where)
    values["defaults"]["train"] |= {"eval_data": str(tmp_path / "nowhere"), "eval_cache": None}
    with pytest.raises(CachekdError) as caught:
        run(read(values, tmp_path))
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert not (Path(values["out"]) / "cache").exists()


# ---- an evaluation's inputs


def test_an_evaluation_takes_a_dump_in_the_teachers_place_and_the_training_data_for_its_prior(
    values, tmp_path, data_path
):
    test = tmp_path / "test"
    write_tar(test / "0.tar", [(f"t{name}", content) for name, content in tar_members(4, start=40)])
    values["steps"] = [
        {"step": "dump", "name": "asked", "data": str(test)},
        {"step": "eval", "name": "cached", "models": ["m"], "data": str(test), "cache": "asked"},
        {"step": "eval", "name": "live", "models": ["m"], "data": str(test)},
    ]
    values["defaults"] |= {"limit": 5}
    cached, live = [step for step in plan_steps(read(values, tmp_path)) if step.kind == "eval"]
    assert (cached.config.teacher, cached.upstream) == (None, ("asked",))
    assert (live.config.teacher, live.upstream) == (values["defaults"]["teacher"], ())
    for step in (cached, live):
        assert step.config.limit is None
        prior = step.data["prior_data"]
        assert (prior.data, prior.limit) == (str(data_path), 5)


def test_the_prior_reads_the_training_data_as_the_defaults_say_and_not_as_the_step_does(
    values, tmp_path, data_path
):
    values["defaults"] |= {"key": "uid", "limit": 5, "max_tokens": 99}
    own = {"map": "mymap:f", "key": "id", "image_field": "picture", "on_error": "skip", "max_tokens": 50}
    values["steps"] = [{"step": "eval", "name": "scores", "models": ["m"], "data": "test.json"} | own]
    (step,) = plan_steps(read(values, tmp_path))
    assert (step.config.map, step.config.key, step.config.image_field) == ("mymap:f", "id", ("picture",))
    for prior in (step.data["prior_data"], step.config.prior_data.inheriting_from(step.config)):
        assert prior == DataOptions(data=str(data_path), key="uid", limit=5, max_tokens=99)


def test_null_in_a_step_turns_off_what_is_preset(values, tmp_path):
    values["defaults"] |= {"key": "uid", "max_tokens": 99}
    values["defaults"]["train"] |= {"lora": {"r": 4}, "stage": "dft"}
    values["steps"][1] |= {"cache": None, "stage": "sft", "lora": None, "student": None}
    values["steps"][2] |= {"stage": None, "lambda_vsd": 0, "lambda_align": 0, "key": None}
    values["steps"][4] |= {"teacher": None, "prior_data": None, "max_tokens": None, "cache": None}
    planned = {step.name: step for step in plan_steps(read(values, tmp_path))}
    dpt, sft, scores = (planned[name].config for name in ("dpt", "sft", "scores"))
    assert (dpt.cache, dpt.lora, dpt.student) == (None, None, values["defaults"]["student"])
    assert (sft.stage, sft.key, sft.lora) == (None, None, {"r": 4})
    assert (scores.teacher, scores.prior_data, scores.max_tokens) == (None, None, None)
    assert planned["scores"].data.keys() == {"data"}
    values["steps"][3] |= {"cache": None}
    with pytest.raises(CachekdError, match="need the teacher's cached logits") as caught:
        plan_steps(read(values, tmp_path))
    assert "step 'dft'" in str(caught.value.where)


def evaluating(values: dict[str, Any], data: Path, **settings: Any) -> None:
    """A dump of test data, and an evaluation by it; nothing else."""
    values["steps"] = [
        {"step": "dump", "name": "asked", "data": str(data)},
        {"step": "eval", "name": "scores", "models": [values["defaults"]["student"]], "cache": "asked"}
        | {"data": str(data)}
        | settings,
    ]


def begun(*_: Any) -> None:
    raise CachekdError("the dump is begun")


def test_an_evaluation_by_a_dump_of_another_tokenizer_is_begun(values, tmp_path, data_path):
    """The dump will say what its token ids stand for."""
    other = save_vlm(tmp_path / "other", tiny_processor(corpus=["quite other words"] * 50))
    evaluating(values, data_path, models=[str(other)], history="full")
    with pytest.raises(CachekdError, match="the dump is begun"):
        run(read(values, tmp_path), dump=begun)


def test_an_evaluation_by_a_cache_that_nobody_can_read_is_refused_first(
    values, tmp_path, data_path, cache_path
):
    other = save_vlm(tmp_path / "other", tiny_processor(corpus=["quite other words"] * 50))
    older = of_an_earlier_version(shutil.copytree(cache_path, tmp_path / "older"), name="models/gone")
    evaluating(values, data_path, models=[str(other)], history="full", cache=older)
    with pytest.raises(CachekdError, match="does not say what its token ids stand for") as caught:
        run(read(values, tmp_path), dump=begun)
    assert "step 'scores'" in str(caught.value.where)


def test_questions_within_conversations_are_no_ones_to_ask_alone_of_a_cache(values, tmp_path, data_path):
    evaluating(values, data_path)
    with pytest.raises(CachekdError, match="not to questions asked alone") as caught:
        run(read(values, tmp_path), dump=begun)
    assert "step 'scores': sample 's001'" in str(caught.value.where)
    assert "history: full" in str(caught.value.fix)
    for settings in ({"history": "full"}, {"cache": None}):
        evaluating(values, data_path, **settings)
        with pytest.raises(CachekdError, match="the dump is begun"):
            run(read(values, tmp_path), dump=begun)


def test_an_answer_that_is_not_supervised_is_no_question_of_its_own(tmp_path):
    def turns(*supervised: bool) -> list[dict[str, Any]]:
        asked = {"role": "user", "content": "what?"}
        said = {"role": "assistant", "content": "this"}
        return [turn for one in supervised for turn in (asked, {**said, "train": one})]

    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "a", "messages": turns(True, False)}]))
    assert len(open_samples(data).preview(0).answered) == 2
    require_single_questions(open_samples(data))
    for supervised in ((True, True), (False, True)):
        data.write_text(json.dumps([{"id": "a", "messages": turns(*supervised)}]))
        with pytest.raises(CachekdError, match="not to questions asked alone"):
            require_single_questions(open_samples(data))


def test_planning_waits_for_no_torch():
    """Terms are switched on and off in it, of which the losses need torch."""
    code = "import sys; from pathlib import Path; from cachekd.pipeline import plan_steps, read_pipeline\n"
    code += "steps = plan_steps(read_pipeline(Path('examples/easy_vqa/pipeline.yaml')))\n"
    code += "assert any(step.kind == 'train' and step.config.switches for step in steps)\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
