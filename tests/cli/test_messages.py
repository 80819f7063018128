"""What cannot be used is said, at once and with what to do; nothing of it ends in a traceback."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from pydantic import ByteSize
from typer.testing import CliRunner

from cachekd import DenseTargets, losses
from cachekd.cache import Geometry, LogitCache, Manifest, overview, select_topk, verify_files
from cachekd.cache.build import dump_status
from cachekd.cache.derive import merge_caches
from cachekd.cache.recompress import recompress
from cachekd.cache.summary import summarise
from cachekd.config import Config, DataOptions, DumpConfig, TrainConfig, read_config
from cachekd.config.fields import COUNT
from cachekd.data import open_samples
from cachekd.dump.plan import codec_of
from cachekd.errors import CachekdError
from cachekd.export import export_parquet, export_webdataset
from cachekd.hub.push import dataset_card
from cachekd.models import load_config
from cachekd.models.tinyllava import convert_tinyllava
from cachekd.paths import RUN_FILE
from cachekd.report import build_report, read_run, write_report
from cachekd.train import train
from cachekd_cli.console import console, errors, progress_bar, say, say_wrong, table
from cachekd_cli.main import app
from caches import ROOT, copied, select_samples
from tiny import checked, write_llava_json

CONFIGS: dict[type[Config], dict[str, Any]] = {
    DumpConfig: {"teacher": "t", "data": "d", "out": "o"},
    TrainConfig: {"student": "s", "data": "d", "out": "o"},
    DataOptions: {"data": "d"},
}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: object) -> CachekdError:
    """What a command says that refuses something."""
    result = invoke(*arguments)
    assert isinstance(result.exception, CachekdError), result.exception
    return result.exception


def numbers_of(model: type[Config], kind: type) -> list[str]:
    fields = model.model_fields.items()
    return [name for name, field in fields if kind in (field.annotation, *get_args(field.annotation))]


# ---- numbers


@pytest.mark.parametrize("model", CONFIGS, ids=lambda model: model.__name__)
def test_no_setting_takes_a_number_that_nothing_can_hold(model):
    whole, real = numbers_of(model, int) + numbers_of(model, ByteSize), numbers_of(model, float)
    assert "limit" in whole
    tries = [(name, 10**20) for name in whole] + [(name, float(x)) for name in real for x in ("inf", "nan")]
    for name, value in tries:
        with pytest.raises(CachekdError, match=f"setting '{name}'"):
            read_config(None, model, CONFIGS[model] | {name: value})


def test_the_largest_settings_of_a_dump_fit_its_files():
    names = set(numbers_of(DumpConfig, int)) - {"top_k", "rank"}
    largest = read_config(None, DumpConfig, CONFIGS[DumpConfig] | dict.fromkeys(names, COUNT))
    codec_of(largest.model_copy(update={"top_k": 2**16 - 1}))
    sizes = {name: getattr(largest, name) for name in ("shard_samples", "batch_size", "calibration_tokens")}
    Geometry(**sizes, group_samples=largest.batch_size * 8)
    with pytest.raises(CachekdError, match="setting 'top_k'"):
        read_config(None, DumpConfig, CONFIGS[DumpConfig] | {"top_k": 2**16})


@pytest.mark.parametrize("option", ["--top-k", "--window"])
def test_more_than_the_vocabulary_is_refused_before_weights_are_read(
    tmp_path, teacher_path, data_path, option
):
    teacher = copied(teacher_path, tmp_path / "teacher")
    (teacher / "model.safetensors").unlink()
    said = refusal("dump", "--teacher", teacher, "--data", data_path, "--out", tmp_path / "c", option, 400)
    ids = 320  # of the tiny language model
    tokens = json.loads((teacher / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(tokens) <= ids
    assert said.expected == f"at most {len(tokens):,}, its ids"
    assert said.fix == f"{option} {len(tokens)}"
    assert "larger than the teacher's vocabulary" in said.problem
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("value", ["100000", "-1", "0"])
def test_a_top_k_out_of_range_is_refused(tmp_path, teacher_path, data_path, value):
    arguments = ["dump", "--teacher", teacher_path, "--data", data_path, "--out", tmp_path / "c"]
    assert "'top_k'" in str(refusal(*arguments, "--top-k", value))


# ---- paths


def written_by(command: str, cache: Path, run: Path, data: Path) -> list[object]:
    """A command, up to the name of the file that it writes."""
    return {
        "report": ["report", run, "--out"],
        "inspect": ["inspect", cache, "--html"],
        "peek": ["peek", cache, "--html"],
        "bind": ["bind", cache, "--data", data, "--out"],
        "schema": ["schema", "manifest", "--out"],
    }[command]


WRITERS = ("report", "inspect", "peek", "bind", "schema")


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory, student_path: Path, data_path: Path) -> Path:
    """A run of one step by L_CE alone."""
    out = tmp_path_factory.mktemp("runs") / "ce"
    plain = {"lambda_align": 0, "lambda_vsd": 0, "batch_size": 12, "logging_steps": 1}
    train(TrainConfig(student=str(student_path), data=str(data_path), out=out, **plain))
    return out


@pytest.mark.parametrize("command", WRITERS)
def test_a_file_goes_into_a_folder_that_is_not_there_yet(tmp_path, cache_path, run_path, data_path, command):
    out = tmp_path / "x" / "y" / "z"
    result = invoke(*written_by(command, cache_path, run_path, data_path), out)
    assert result.exit_code == 0, result.exception
    assert out.stat().st_size > 50


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("place", ["folder", "file/below", "pipe", "s3://bucket/page", ""])
def test_where_no_file_can_be_written_is_said(
    tmp_path, monkeypatch, cache_path, run_path, data_path, command, place
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")  # as a device it must not become a file, or be waited for
    monkeypatch.chdir(tmp_path)
    refusal(*written_by(command, cache_path, run_path, data_path), place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_where_a_binding_would_go_is_looked_at_before_anything_is_read(tmp_path):
    (tmp_path / "there").touch()
    for out, says in (("there/b.json", "cannot be written"), ("there", "exists already")):
        said = refusal("bind", tmp_path / "none", "--data", tmp_path / "no", "--out", tmp_path / out)
        assert says in said.problem


def test_functions_take_paths_as_text(tmp_path, monkeypatch, cache_path, run_path, data_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cache_path, "cache")
    shutil.copytree(run_path, "run")
    assert summarise("cache").samples == 12
    assert Manifest.load("cache").samples == 12
    assert verify_files("cache") == []
    assert dump_status("cache").finished
    assert recompress("cache", "small", top_k=4).samples == 12
    assert select_samples("cache", "a", {"s000"}).samples == 1
    select_samples("cache", "b", {"s001"})
    assert merge_caches(["a", "b"], "ab").samples == 2
    assert export_parquet("cache", "table") == 12
    assert export_webdataset("cache", "tars", open_samples(data_path)) == 12
    assert write_report("run", [], "page.html").is_file()


@pytest.mark.parametrize("text", ["", "[1]", '"x"', '{"a": 1}', "\ufffd{"])
def test_a_record_that_is_not_a_runs_is_refused(tmp_path, text):
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(CachekdError, match="record"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", [None, "", "[1]", '{"a": 1}', '{"model_type": "tinyllava"}'])
def test_what_is_no_checkpoint_is_refused_without_asking_the_hub(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CachekdError):
        convert_tinyllava(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("command", ["dump", "train"])
def test_where_no_folder_can_be_made_is_said_before_anything_is_read(tmp_path, command):
    (tmp_path / "file").touch()
    arguments = ["--data", tmp_path / "no.json", "--out", tmp_path / "file" / "below"]
    models = ["--student", "no", "--lambda-align", 0, "--lambda-vsd", 0]
    said = refusal(command, *arguments, *(models if command == "train" else ["--teacher", "no"]))
    assert said.problem == "a file cannot be written"


@pytest.mark.parametrize("text", ["[1]", '"x"', "1", "null"])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CachekdError, match="no model can be loaded"):
        load_config(str(tmp_path))


# ---- in Python


TOKENS, VOCAB = 3, 20


@pytest.mark.parametrize("loss", ["dbild", "forward_kl", "reverse_kl", "topk_kl", "bild"])
@pytest.mark.parametrize("shape", [(TOKENS, VOCAB - 1), (TOKENS + 1, VOCAB), (VOCAB,)])
def test_logits_that_do_not_fit_the_targets_are_refused(loss, shape):
    with pytest.raises(CachekdError, match="do not match the teacher's targets"):
        getattr(losses, f"{loss}_loss")(torch.zeros(shape), DenseTargets(torch.randn(TOKENS, VOCAB)))


@pytest.mark.parametrize(
    ("shape", "tokens", "settings"),
    [
        ((VOCAB,), TOKENS, {}),
        ((TOKENS, VOCAB), TOKENS - 1, {}),
        ((TOKENS, VOCAB), TOKENS, {"top_k": 0}),
        ((TOKENS, VOCAB), TOKENS, {"top_k": 10**9}),
        ((TOKENS, VOCAB), TOKENS, {"top_p": -0.1}),
        ((TOKENS, VOCAB), TOKENS, {"min_k": 0}),
    ],
)
def test_what_a_selection_cannot_be_made_of_is_refused(shape, tokens, settings):
    with pytest.raises(CachekdError, match=r"do not fit|out of range"):
        select_topk(torch.zeros(shape), torch.zeros(tokens, dtype=torch.long), **settings)


@pytest.mark.parametrize("shape", [(), (5,), (5, 0)])
def test_kneedle_takes_rows(shape):
    with pytest.raises(CachekdError, match="rows of logits"):
        losses.kneedle_k(torch.zeros(shape))


def test_ids_that_do_not_fit_the_targets_are_refused(cache_path):
    targets = next(iter(LogitCache(cache_path).shard_targets(0)))
    for ids in (torch.zeros(len(targets) + 1, 1).long(), torch.zeros(len(targets), 1), torch.zeros(1).long()):
        with pytest.raises(CachekdError, match="ids do not fit"):
            targets.gather(ids)


def test_a_path_that_is_none_is_a_type_error(cache_path):
    for wrong in (5, None):
        with pytest.raises(TypeError, match="PathLike"):
            LogitCache(wrong)
    with pytest.raises(CachekdError, match="at some tokens"):
        summarise(cache_path, entropy_tokens=0)


# ---- advice


def test_a_key_that_a_cache_lacks_is_answered_with_near_ones_and_how_to_see_all(cache_path):
    said = refusal("peek", cache_path, "s0001")
    assert "s001" in str(said.expected)
    command = re.search("`cachekd (.+?)`", str(said.fix))
    assert command is not None
    shown = invoke(*command[1].split())
    assert shown.exit_code == 0
    assert "s001" in shown.output


def test_check_does_not_advise_to_run_check(teacher_path, tmp_path, data_path):
    """A bridge was asked for and does not do: the row says what else there is."""
    from tiny import save_vlm, tiny_processor

    student = save_vlm(tmp_path / "other", tiny_processor(), vision_width=48, feature_layer=-2)
    report = checked(str(teacher_path), str(student), str(data_path), switch_bridge="linear")
    (row,) = (row for row in report.rows if row.name == "switch bridge")
    assert row.state == "refused"
    assert "--lambda-vsd 0" in str(row.fix)
    for each in report.rows:
        assert "cachekd check" not in f"{each.text} {each.fix}"


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("data", "data/train/train.json"),  # a folder further up
        ("data/train/train", "data/train/train.json"),  # without its suffix: no name on the hub either
        ("data/trian", "data/train"),
        ("several", "several/several.json"),
    ],
)
def test_a_data_set_that_lies_near_is_named(tmp_path, monkeypatch, spec, meant):
    monkeypatch.chdir(tmp_path)
    source = write_llava_json(tmp_path / "data" / "train", 1)
    Path("several").mkdir()
    for name in ("a", "several"):
        shutil.copy(source, Path("several") / f"{name}.json")
    source.rename(source.with_name("train.json"))
    with pytest.raises(CachekdError) as caught:
        open_samples(spec)
    assert meant in str(caught.value.fix)


def advice() -> list[tuple[str, str]]:
    """Every text in the code, but for its documentation, with where it stands."""
    found = []
    for path in sorted([*(ROOT / "cachekd").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]):
        tree = ast.parse(path.read_text())
        documentation = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        inside = {
            id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
        }
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                found.append((where, "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and id(node) not in documentation | inside:
                found.append((where, str(node.value)))
    return found


# Of other programs.
OTHERS = {
    "--upgrade",
    "--yes",
    "--local-dir",
    "--num_processes",
    "--multi_gpu",
    "--dereference",
    "--hard-dereference",
}


def test_every_command_and_option_that_a_message_names_exists():
    whole: Any = typer.main.get_command(app)
    commands = whole.commands
    options = {
        name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} for name, c in commands.items()
    }
    known = set.union(*options.values()) | OTHERS | {o for p in whole.params for o in p.opts} | {"--help"}
    seen = 0
    for where, text in advice():
        for name in re.findall(r"(?:`|^next: |^try: |^)cachekd ([a-z]+)(?=`| [-{<A-Z])", text):
            assert name in commands, (where, text)
            seen += 1
        for name, rest in re.findall(r"`cachekd ([a-z]+)([^`]*)`", text):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest):
                assert option in options[name], (where, text)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", text):
            assert option in known, (where, option, text)
    assert seen > 20


# ---- one figure


def squeezed(text: str) -> str:
    """A cell of a table may go over several lines."""
    return re.sub(r"[\s│]", "", text)


def test_every_page_gives_the_same_bytes_per_token(cache_path, run_path):
    manifest = Manifest.load(cache_path)
    shards = sum(path.stat().st_size for path in (cache_path / "shards").iterdir())
    sketch = (cache_path / "sketch.zarr.zip").stat().st_size
    tokens = sum(len(targets) for targets in map(LogitCache(cache_path).__getitem__, LogitCache(cache_path)))
    figure = f"{shards / tokens:,.1f} in the shards, {(shards + sketch) / tokens:,.1f} with the tail sketch"
    assert figure in dataset_card(manifest, "org/name", None)
    summary = summarise(cache_path)
    assert overview.headline(summary)["bytes per token"] == figure
    assert summary.bytes_per_token == shards / tokens
    assert squeezed(figure) in squeezed(invoke("inspect", cache_path).output)
    run = read_run(run_path)
    run.saved["cache"] = manifest.model_dump(mode="json")
    assert figure in build_report(run, [])


def test_the_dumps_summary_gives_it_too(cache_path, teacher_path, data_path):
    arguments = ["dump", "--teacher", teacher_path, "--data", data_path, "--out", cache_path]
    result = invoke(*arguments, "--batch-size", 4)  # finished: it only says what there is
    assert result.exit_code == 0, result.exception
    figure = overview.headline(summarise(cache_path))["bytes per token"]
    assert squeezed(figure) in squeezed(result.output)


# ---- versions


def test_the_versions_are_said_without_importing_what_has_them():
    code = "import sys; sys.argv = ['cachekd', '--version']\nfrom cachekd_cli.main import app\n"
    code += "try:\n    app()\nfinally:\n    assert not {'torch', 'transformers', 'zarr'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    import torch
    import transformers
    import zarr

    import cachekd

    first, second = done.stdout.splitlines()
    assert first == f"cachekd {cachekd.__version__}"
    for name, module in (("torch", torch), ("transformers", transformers), ("zarr", zarr)):
        assert f"{name} {module.__version__.partition('+')[0]}" in second  # builds are not always told apart
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{cachekd.__version__}"' in pyproject


def test_a_word_between_colons_stays_a_word():
    """Rich makes pictures of some, as of `:key:`; of keys and paths they would be others."""
    with console.capture() as shown:
        say("data/:key:.json")
        console.print(table("cache :key:", ("", "value"), [(":key:", ":smile:")]))
    assert shown.get().count(":key:") == 3
    assert ":smile:" in shown.get()


def test_what_is_shown_is_no_markup_and_commands_nothing():
    """Such as a key that somebody else has chosen."""
    name = "[/x]\x1b[2J"
    bar = progress_bar("samples")
    bar.add_task("runs/[/x]", total=1, note="[/y]")
    with console.capture() as shown, errors.capture() as wrong:
        say(name)
        say_wrong(name, f"a\n{name}")
        console.print(table("", ("", ""), [(name, f"{name}\nb")]))
        console.print(bar.make_tasks_table(bar.tasks))
    text = shown.get() + wrong.get()
    assert "\x1b[2J" not in text
    assert text.count(r"[/x]\x1b[2J") == 5
    assert "a\n[/x]" in text
    assert re.search(r"runs/\[/x\] .*\[/y\]", text)
