"""The configuration models are the only place where an option stands: the commands' are made of them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import typer
import yaml
from pydantic import Field
from pydantic_core import PydanticUndefined
from typer.testing import CliRunner

from cachekd.config import (
    CheckConfig,
    Config,
    DataOptions,
    DumpConfig,
    EvalConfig,
    ReportConfig,
    TrainConfig,
    read_config,
)
from cachekd.config.losses import Loss
from cachekd.errors import CachekdError
from cachekd_cli.main import PANELS, app
from cachekd_cli.options import takes

COMMANDS: dict[str, Any] = {name: each for panel in PANELS.values() for name, each in panel.items()}
CLICK: Any = typer.main.get_command(app)
WITH_FILE = {
    "check": CheckConfig,
    "dump": DumpConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "report": ReportConfig,
}
ARGUMENTS = {"models", "run"}
NAMED = {"baselines": "--baseline"}
IN_FILE_ALONE = {"lora", "training"}


def model_of(command: Any) -> type[Config] | None:
    """That a command's own parameters have among them."""
    own = inspect.signature(inspect.unwrap(command), eval_str=True).parameters.values()
    kinds = [kind for p in own for kind in (p.annotation, *get_args(p.annotation))]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)), None)


MODELS = {name: model for name, command in COMMANDS.items() if (model := model_of(command)) is not None}


def as_yaml(value: Any) -> str:
    return yaml.safe_dump(value).removesuffix("...\n").strip()


def shown_default(field: Any) -> str | None:
    """A default as one would write it into the YAML; none where a setting is off or left open."""
    value = field.default
    if value is PydanticUndefined or value in (None, (), []) or value is False:
        return None
    if isinstance(value, Loss):  # by its name
        value = value.loss
    return "on" if value is True else ",".join(value) if isinstance(value, tuple) else as_yaml(value)


def choices_in_schema(schema: dict[str, Any]) -> list[str]:
    """Those that the JSON Schema has, at any depth."""
    here = schema.get("enum", [schema["const"]] if "const" in schema else [])
    inner = [*([schema["items"]] if "items" in schema else []), *schema.get("anyOf", [])]
    return [*here, *(one for part in inner for one in choices_in_schema(part))]


def options_named(command: str, name: str) -> list[Any]:
    """Options and arguments of that name, however it is spelt."""
    spelt = {name, f"--{name.replace('_', '-')}", f"--{name}", NAMED.get(name)}
    return [parameter for parameter in CLICK.commands[command].params if spelt & set(parameter.opts)]


def test_the_commands_with_a_configuration_are_all_looked_at():
    assert WITH_FILE.items() <= MODELS.items()
    of_data = {"bind", "peek", "verify", "export"}
    assert {name: MODELS[name] for name in of_data} == dict.fromkeys(of_data, DataOptions)


@pytest.mark.parametrize("command", MODELS)
def test_every_setting_is_one_option_with_the_models_help_default_and_choices(command):
    model = MODELS[command]
    for name, field in model.model_fields.items():
        if name in IN_FILE_ALONE:
            (config,) = options_named(command, "config")
            assert options_named(command, name) == []
            assert f"{name} ({field.description})" in config.help
            continue
        (option,) = options_named(command, name)
        assert option.help.lower().startswith(f"{field.description.lower()}.")
        assert (option.default, option.required) == (None, False)  # what is not given may stand in the file
        told = option.help[len(field.description) + 1 :]
        default, choices = shown_default(field), choices_in_schema(schema_of(model, name))
        assert ("Required." in told) == field.is_required()
        if default is None:
            assert "Default" not in told
        elif isinstance(field.default, float):
            assert float(told.split("Default: ")[1].removesuffix(".")) == field.default
        else:
            assert f"Default: {default}." in told
        assert f"Choices: {', '.join(choices)}." in told if choices else "Choices" not in told


def schema_of(model: type[Config], name: str) -> dict[str, Any]:
    return model.model_json_schema()["properties"][name]


@pytest.mark.parametrize("command", WITH_FILE)
def test_no_option_but_a_commands_own_is_none_of_its_model(command):
    own = {"config", "json", "estimate"}
    options = {name for p in CLICK.commands[command].params for name in p.opts}
    fields = {option: name for name, option in NAMED.items()}
    options = {fields.get(option, option.removeprefix("--").replace("-", "_")) for option in options}
    assert options - MODELS[command].model_fields.keys() <= own


def test_an_option_of_the_same_name_by_hand_is_a_mistake_at_once():
    with pytest.raises(ValueError, match="duplicate parameter name: 'limit'"):

        @takes(DataOptions)
        def command(data: DataOptions, limit: int = 3) -> None: ...


class Small(Config):
    """A model of the kinds of settings that there are."""

    size: int = Field(3, ge=1, description="how many")
    colour: Literal["red", "blue"] = Field("red", description="of it")
    names: tuple[str, ...] = Field((), description="again for several")
    fast: bool = Field(False, description="be fast")
    loud: bool = Field(True, description="be loud")
    share: float | Literal["auto"] = Field("auto", description="of them")
    others: dict[str, Any] = Field({}, description="for another library")


def run_small(*words: str, file: Path | None = None) -> Any:
    """What a command with these options is given."""
    seen: list[Any] = []

    @takes(Small)
    def command(config: Small, times: int = 1) -> None:
        seen.append((config, times))

    small = typer.Typer()
    small.command()(command)
    given = [] if file is None else ["--config", str(file)]
    result = CliRunner().invoke(small, [*given, *words])
    if result.exception is not None:
        raise result.exception
    return seen[0]


def test_a_new_field_is_a_new_option_and_nothing_else_is_to_do(tmp_path):
    assert run_small() == (Small(), 1)
    said = ["--size", "7", "--colour", "blue", "--names", "a", "--names", "b", "--fast", "--no-loud"]
    meant = Small(size=7, colour="blue", names=("a", "b"), fast=True, loud=False, share=0.5)
    assert run_small(*said, "--share", "0.5", "--times", "2") == (meant, 2)
    file = tmp_path / "small.yaml"
    file.write_text("size: 9\nnames: [c]\nfast: true\nothers: {r: 1}\n")
    assert run_small(file=file)[0] == Small(size=9, names=("c",), fast=True, others={"r": 1})
    assert run_small("--size", "4", file=file)[0] == Small(size=4, names=("c",), fast=True, others={"r": 1})
    assert run_small("--size", "4", file=file)[0].model_fields_set == {"size", "names", "fast", "others"}


# ---- what is given comes to the model as a file would have it

# Where 2 would not do.
VALUES: dict[str, Any] = {
    "data": "d",
    "map": "m:f",
    "key": "k",
    "image_field": ["x", "y.z"],
    "image_root": "i",
    "quantization": "4bit",
    "teacher_quantization": "8bit",
    "student_quantization": "4bit",
    "teacher_mismatch": "accept",
    "align_vocabulary": "cells",
    "on_error": "skip",
    "on_oom": "halve",
    "too_long": "cut",
    "models": ["m", "n"],
    "run": "r",
    "baselines": ["q", "p"],
    "teacher": "t",
    "device_map": "auto",
    "max_memory": "0=20GB,cpu=60GB",
    "teacher_device_map": "map.yaml",
    "teacher_max_memory": "cpu=1GB",
    "student": "s",
    "cache": "c",
    "out": "o",
    "disk_budget": "50GB",
    "tail": "step=0.1",
    "top_p": 0.5,
    "rank": 0,
    "dtype": "float16",
    **dict.fromkeys(("attn_implementation", "teacher_attn_implementation"), "eager"),
    "student_attn_implementation": "sdpa",
    "student_dtype": "bfloat16",
    "float32_head": True,
    "live_teacher": True,
    "binding": "b.json",
    "missing": "skip",
    "eval_cache": "vc",
    "eval_data": "v",
    "stage": "dpt",
    "trainable": "projector,vision_encoder",
    "switch_bridge": "linear",
    "warmup": 0.25,
    "keep_checkpoints": True,
    "log_term_gradients": True,
    "align": "{loss: dbild, direction: teacher}",
    "vsd": "reverse_kl",
    "lambda_vsd": "{schedule: linear, start: 0, end: 1}",
    "gradient_checkpointing": True,
    "history": "full",
    "blind": False,
    "prior_data": "p",
    "forward": True,
    "benchmarks": "pope,gqa",
    "suite": "switch-kd",
    "tasks_dir": "tasks",
    "benchmark_data": ["pope=a", "gqa=b"],
}
# What a setting does not go without, beside those that are required.
WITH = {
    EvalConfig: {name: {"benchmarks": "pope"} for name in ("tasks_dir", "benchmark_data", "suite")}
    | {"benchmarks": {}},
}
OTHERWISE = {EvalConfig: {"data": "d"}}


@pytest.mark.parametrize("model", list(dict.fromkeys(MODELS.values())), ids=lambda model: model.__name__)
def test_an_option_says_what_a_file_would(model, tmp_path):
    file, seen, typed = tmp_path / "all.yaml", [], typer.Typer()

    def take(config: Any) -> None:
        seen.append(config)

    take.__annotations__["config"] = model
    typed.command()(takes(model, arguments=ARGUMENTS, named=NAMED)(take))
    needed = {name: VALUES[name] for name, field in model.model_fields.items() if field.is_required()}
    for name in model.model_fields.keys() - IN_FILE_ALONE:
        beside = WITH.get(model, {}).get(name, OTHERWISE.get(model, {}))
        said = needed | beside | {name: VALUES.get(name, 2)}
        words = [word for each, value in said.items() for word in as_words(each, value)]
        result = CliRunner().invoke(typed, words)
        assert result.exception is None, (name, result.exception)
        file.write_text(yaml.safe_dump(said))
        read = read_config(file, model, {})
        assert seen.pop() == read
        assert said.keys() <= read.model_fields_set


def as_words(name: str, value: Any) -> list[str]:
    option = NAMED.get(name, f"--{name.replace('_', '-')}")
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    values = list(map(str, value if isinstance(value, list) else [value]))
    return values if name in ARGUMENTS else [word for one in values for word in (option, one)]


# ---- what is refused


@pytest.mark.parametrize("command", MODELS)
def test_a_wrong_choice_is_refused_with_the_choices(command):
    own = {"bind": ["c"], "peek": ["c"], "verify": ["c"], "export": ["c", "o", "--to", "parquet"]}
    for name in MODELS[command].model_fields:
        choices = choices_in_schema(schema_of(MODELS[command], name))
        if not choices:
            continue
        words = [command, *own.get(command, []), "--data", "d", *as_words(name, "purple")]
        error = CliRunner().invoke(app, words).exception
        assert isinstance(error, CachekdError)
        assert f"setting '{name}" in str(error)
        assert "purple" in str(error)
        assert all(f"'{choice}'" in str(error) for choice in choices)


@pytest.mark.parametrize("command", WITH_FILE)
def test_what_is_missing_is_named_as_it_is_typed(command):
    error = CliRunner().invoke(app, [command]).exception
    assert isinstance(error, CachekdError)
    missing = [name for name, field in MODELS[command].model_fields.items() if field.is_required()]
    assert all(f"setting '{name}': field required" in error.problem for name in missing)
    assert error.fix == "give " + " and ".join(n.upper() if n in ARGUMENTS else f"--{n}" for n in missing)


# ---- what is each command's own


@pytest.mark.parametrize("command", [name for name in WITH_FILE if name != "report"])  # which has no data
def test_a_file_says_what_options_do_not(command, tmp_path):
    """An option before it. What the command would do with it is not done here."""
    model, file = WITH_FILE[command], tmp_path / "file.yaml"
    needed = {name: VALUES[name] for name, field in model.model_fields.items() if field.is_required()}
    file.write_text(yaml.safe_dump(needed | {"limit": 3, "max_tokens": 0}))
    error = CliRunner().invoke(app, [command, "--config", str(file), "--limit", "-1"]).exception
    assert isinstance(error, CachekdError)
    lines = error.problem.splitlines()[1:]
    assert sorted(line.split("'")[1] for line in lines) == ["limit", "max_tokens"]
    assert "the command line" in next(line for line in lines if "'limit'" in line)
    assert str(file) in next(line for line in lines if "'max_tokens'" in line)


def test_a_report_is_made_from_a_file_too(tmp_path):
    file = tmp_path / "report.yaml"
    file.write_text(f"run: {tmp_path / 'none'}\nbaselines: [b]\nout: {tmp_path / 'page.html'}\n")
    for words, run in (([], "none"), ([str(tmp_path / "other")], "other")):
        error = CliRunner().invoke(app, ["report", *words, "--config", str(file)]).exception
        assert isinstance(error, CachekdError)
        assert (error.problem, error.where) == ("this is not a run", str(tmp_path / run))


def test_a_process_that_was_told_its_rank_need_not_say_it(tmp_path):
    """By torchrun or accelerate; they tell every process, whatever the file that all of them read says."""
    told, empty = {"RANK": "3", "WORLD_SIZE": "3"}, {"RANK": "", "WORLD_SIZE": ""}
    for variables in ({}, told, empty):
        words = ["dump", "--teacher", "t", "--data", "d", "--out", str(tmp_path / "c"), "--limit", "0"]
        error = CliRunner().invoke(app, words, env=variables).exception
        assert ("too small for rank 3" in str(error)) == (variables is told)
        assert "setting 'limit'" in str(error)


def test_a_check_reads_the_file_of_a_run(tmp_path):
    run = {"student": "s", "teacher": "t", "data": "d", "out": "o", "epochs": 3, "lora": {"r": 4}, "limit": 7}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    found = read_config(file, CheckConfig, {"samples": 1})
    assert dict(found) == dict(CheckConfig(student="s", teacher="t", data="d", limit=7, samples=1))
    assert found.run is not None
    assert (found.run.lora, found.run.epochs) == ({"r": 4}, 3)
    for name in ("epoch", "binding"):  # neither is passed over
        file.write_text(yaml.safe_dump(run | {name: "x"}))
        with pytest.raises(CachekdError, match=f"unknown setting '{name}'"):
            read_config(file, CheckConfig, {})


@pytest.mark.parametrize("command", ["peek", "verify", "export"])
def test_options_of_data_without_data_are_refused(command):
    own = ["o", "--to", "parquet"] if command == "export" else []
    words = [command, "c", *own, "--image-field", "x", "--limit", "3"]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, CachekdError)
    assert "--image-field, --limit without data" in error.problem


def test_from_a_file_a_pair_is_checked_dumped_trained_and_evaluated(
    tmp_path, teacher_path, student_path, data_path
):
    """The whole way, each step by its own file; the check by the run's."""
    cache, run, scores = tmp_path / "cache", tmp_path / "run", tmp_path / "scores"
    common = {"teacher": str(teacher_path), "data": str(data_path), "limit": 4}
    pair = common | {"student": str(student_path), "cache": str(cache)}
    files = {
        "dump": common | {"out": str(cache), "top_k": 64},
        "check": pair | {"out": str(run), "epochs": 9, "batch_size": 2},
        "train": pair | {"out": str(run), "epochs": 9, "batch_size": 2},
        "eval": common
        | {"models": [str(run)], "blind": False, "prior_data": {"data": str(data_path), "limit": 2}},
    }
    options = {"dump": ["--top-k", "8"], "train": ["--epochs", "1"], "eval": ["--out", str(scores)]}
    for command, settings in files.items():
        file = tmp_path / f"{command}.yaml"
        file.write_text(yaml.safe_dump(settings))
        words = [command, "--config", str(file), *options.get(command, []), "--json"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (command, result.exception, result.output)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["codec"]["top_k"] == 8
    assert json.loads((run / "cachekd_run.json").read_text())["steps"] == 2
    (row,) = json.loads((scores / "scores.json").read_text())["models"]
    assert row["name"] == str(run)
