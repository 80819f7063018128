"""docs/reference/format.md and schemas/ against files, and a reader that knows nothing but the document."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
import zarr
from typer.testing import CliRunner

from cachekd.cache import LogitCache, Manifest
from cachekd.cache.recompress import recompress
from cachekd.cache.sealed import _seal
from cachekd.config import DumpConfig, read_config
from cachekd.data.conversation import messages_from_turns
from cachekd.data.records import TURN_FIELDS
from cachekd.errors import BadSample, CachekdError
from cachekd.schemas import SCHEMAS
from cachekd_cli.main import app
from caches import GOLDEN, GOLDEN_SKETCH, GOLDEN_VOCABULARY, ROOT, files_of
from schema_files import schema, valid
from tiny import conversation, tar_members, write_llava_json

DOCUMENT = (ROOT / "docs" / "reference" / "format.md").read_text()
# In a process that has no cachekd: every row of every sample, to a file.
READ_ALL = """
import sys
sys.modules["cachekd"] = None
sys.path[:] = [place for place in sys.path if place not in sys.argv[2].split(":")]
sys.path.insert(0, sys.argv[3])
from pathlib import Path
import numpy as np
import read_cache_plain as plain
found = {}
for number, folder in enumerate(map(Path, sys.argv[4:])):
    for shard in sorted((folder / "shards").iterdir()):
        for key in plain.read_arrays(shard)["sample_keys"].tobytes().decode().split("\\n"):
            tokens, rows = plain.read_sample(folder, key)
            found[f"{number} tokens {key}"], found[f"{number} rows {key}"] = tokens, rows
    for token, content in enumerate(plain.read_vocabulary(folder) or []):
        found[f"{number} bytes {token}"] = np.frombuffer(content, "u1")
np.savez(sys.argv[1], **found)
"""


@pytest.fixture(scope="module")
def derived(tmp_path_factory, skipping_cache) -> Path:
    out = tmp_path_factory.mktemp("derived") / "c"
    recompress(skipping_cache, out, top_k=16, tail="step=1.5")
    return out


# ---- the independent reader


def test_a_reader_without_cachekd_rebuilds_every_logprob(tmp_path, cache_path, derived):
    paths = [GOLDEN, GOLDEN_SKETCH, GOLDEN_VOCABULARY, cache_path, derived]
    ours = ":".join([str(ROOT), str(ROOT / "cli")])
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "rows.npz"), ours, str(ROOT / "examples")]
    subprocess.run([*command, *map(str, paths)], check=True)
    caches = [LogitCache(path) for path in paths]
    with np.load(tmp_path / "rows.npz") as found:
        tables = [[] if cache.vocabulary is None else cache.vocabulary.contents for cache in caches]
        assert [len(table) > 0 for table in tables] == [False, False, True, True, True]
        assert len(found.files) == 2 * sum(map(len, caches)) + sum(map(len, tables))
        for number, table in enumerate(tables):
            for token, content in enumerate(table):
                assert found[f"{number} bytes {token}"].tobytes() == content
        for number, cache in enumerate(caches):
            for key in cache:
                targets = cache[key]
                assert found[f"{number} tokens {key}"].tolist() == targets.token_ids.tolist()
                rows = found[f"{number} rows {key}"]
                np.testing.assert_allclose(rows, targets.everywhere().numpy(), atol=2e-4)


def test_the_plain_reader_is_small_and_imports_little():
    text = (ROOT / "examples" / "read_cache_plain.py").read_text()
    code = [line for line in text.split("\n") if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) <= 75
    imports = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imports - {"__future__", "sys", "pathlib", "typing", "warnings"} == {"json", "numpy", "zarr"}


# ---- the document


def documented_arrays(heading: str) -> dict[str, str]:
    """Names and types in the first table after some text."""
    table = DOCUMENT.split(heading)[1].split("\n| array |")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", table, re.MULTILINE))


@pytest.mark.parametrize(
    ("heading", "file"),
    [
        ("A shard's arrays", "shards/00000.zarr.zip"),
        ("**With a sketch**", "sketch.zarr.zip"),
        ("**The vocabulary**", "vocabulary.zarr.zip"),
    ],
)
def test_the_documented_arrays_are_those_in_the_files(heading, file, skipping_cache):
    documented = documented_arrays(heading)
    with zarr.storage.ZipStore(skipping_cache / file, mode="r") as store:
        found = {name: str(array.dtype) for name, array in zarr.open_group(store, mode="r").arrays()}
    if file.startswith("sketch"):  # what only a writer needs
        assert set(found) - set(documented) == {"analysis", "mean", "common", "numbers"}
    else:
        assert set(found) == set(documented)
    for name, kind in documented.items():
        assert found[name] in kind.split(" or "), name


def field_names(model: dict) -> set[str]:
    """Of a schema and all that it refers to."""
    parts = [model, *model.get("$defs", {}).values()]
    return {name for part in parts for name in part.get("properties", {})}


@pytest.mark.parametrize("name", ["manifest", "plan", "record"])
def test_every_field_is_documented(name):
    missing = {field for field in field_names(schema(name)) if f"`{field}`" not in DOCUMENT}
    assert not missing - {"key", "reason"}  # {"key", "reason"} is there in one piece


def test_the_seal_is_as_documented(skipping_cache):
    import hashlib

    values = json.loads((skipping_cache / "manifest.json").read_bytes())
    found = values.pop("sha256")
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == found == _seal(values)


# ---- the schemas


def test_real_files_fit_their_schemas(skipping_cache, cache_path, derived):
    for path in (skipping_cache, cache_path, derived, GOLDEN, GOLDEN_SKETCH, GOLDEN_VOCABULARY):
        jsonschema.validate(json.loads((path / "manifest.json").read_bytes()), schema("manifest"))
    assert len(Manifest.load(derived).lineage) == 1
    files = files_of(skipping_cache)
    jsonschema.validate(json.loads(files["dump/plan.json"]), schema("plan"))
    records = [name for name in files if re.fullmatch(r"dump/\d+\.json", name)]
    assert len(records) == 4
    for name in records:
        jsonschema.validate(json.loads(files[name]), schema("record"))
    lines = files["skipped.jsonl"].decode().split("\n")[:-1]
    assert len(lines) == 7
    for line in lines:
        jsonschema.validate(json.loads(line), schema("skipped"))


def test_the_schema_refuses_what_the_reader_refuses(skipping_cache):
    values = json.loads((skipping_cache / "manifest.json").read_bytes())
    for way, new in [
        (("format_version",), 2),
        (("teacher", "vocab_size"), 0),
        (("codec", "top_k"), "many"),
        (("vocabulary", "tokens"), 2**21 + 1),
        (("vocabulary", "name"), "x.zarr.zip"),
        (("shards", 0, "name"), "../x.zarr.zip"),
        (("shards", 0, "tokens"), -1),
        (("shards",), []),
        (("later",), 1),
        (("shards", 0, "later"), 1),
    ]:
        changed = copy.deepcopy(values)
        holder = changed
        for name in way[:-1]:
            holder = holder[name]
        holder[way[-1]] = new
        assert not valid("manifest", changed), way
        with pytest.raises(ValueError, match="validation error"):
            Manifest.model_validate(changed)


def test_run_configurations_fit_their_schemas(tmp_path, skipping_cache):
    text = (ROOT / "docs" / "how-to" / "training.md").read_text().split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = read_config(path, SCHEMAS["train"], {})
    jsonschema.validate(yaml.safe_load(text), schema("train"))
    jsonschema.validate(config.model_dump(mode="json"), schema("train"))
    dump = DumpConfig(teacher="t", data="d", out="o", top_k=32, tail="none")
    jsonschema.validate(dump.model_dump(mode="json"), schema("dump"))
    for values in ({**yaml.safe_load(text), "batchsize": 4}, {"student": "s"}, {"epochs": 0}):
        assert not valid("train", values)


USER = {"role": "user", "content": "what?"}
GOOD = [
    {"id": 7, "image": "a.png", "conversations": conversation(1)},
    {"images": ["a.png", "b.png"], "messages": [USER, {"role": "assistant", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x"}]},
    {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "source": "mine"},
    {"conversations": None, "messages": [USER, {"from": "gpt", "value": "x"}]},
    {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "x", "index": None}]}]},
]
BAD = [
    {"id": "a"},
    {"conversations": []},
    {"conversations": "hello"},
    {"conversations": [{"from": "robot", "value": "x"}]},
    {"conversations": [{"from": "gpt"}]},
    {"messages": [{"role": "assistant", "content": 5}]},
    {"messages": [{"role": "assistant", "content": [{"type": "video"}]}]},
    {"messages": [{"role": "assistant", "content": [{"type": "image", "url": "http://x"}]}]},
    {"conversations": None, "messages": None},
]


def read_turns(record: dict) -> None:
    turns = next((record[name] for name in TURN_FIELDS if record.get(name) is not None), None)
    images = record.get("images") or ["one"]
    messages_from_turns(turns, len(images) if isinstance(images, list) else 1, "here")


@pytest.mark.parametrize("record", GOOD)
def test_records_that_are_read_fit_the_schema(record):
    read_turns(record)
    jsonschema.validate(record, schema("sample"))


@pytest.mark.parametrize("record", BAD)
def test_records_that_are_refused_do_not(record):
    with pytest.raises(BadSample):
        read_turns(record)
    assert not valid("sample", record)


def test_the_tests_own_data_fit_the_schema(tmp_path):
    records = json.loads(write_llava_json(tmp_path, 4).read_text())
    records += [json.loads(content) for name, content in tar_members(4) if name.endswith(".json")]
    assert len(records) == 8
    for record in records:
        jsonschema.validate(record, schema("sample"))


# ---- the command


def test_the_command_prints_what_is_in_the_folder(tmp_path):
    for name in SCHEMAS:
        result = CliRunner().invoke(app, ["schema", name])
        assert result.stdout == (ROOT / "schemas" / f"{name}.schema.json").read_text()
        jsonschema.Draft202012Validator.check_schema(json.loads(result.stdout))
    CliRunner().invoke(app, ["schema", "sample", "--out", str(tmp_path / "x.json")])
    assert (tmp_path / "x.json").read_text() == (ROOT / "schemas" / "sample.schema.json").read_text()
    listed = CliRunner().invoke(app, ["schema"]).stdout
    assert all(name in listed for name in SCHEMAS)
    caught = CliRunner().invoke(app, ["schema", "nothing"]).exception
    assert isinstance(caught, CachekdError)
    assert {path.name.split(".")[0] for path in (ROOT / "schemas").glob("*.json")} == set(SCHEMAS)
