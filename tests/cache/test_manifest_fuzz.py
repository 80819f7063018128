"""Any bytes as manifest, plan or record: a cache, or an error for people; never another exception."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cachekd.cache import Finding, LogitCache, Manifest, sealed, verify_files
from cachekd.cache.build import dump_status
from cachekd.cache.derive import merge_caches
from cachekd.cache.plan import FinishedShard, Plan
from cachekd.cache.repair import repair
from cachekd.cache.verify import strays
from cachekd.errors import CachekdError
from cachekd_cli.main import app
from caches import copied, select_samples

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "12")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = st.integers() | st.sampled_from([0, -1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400])
TEXTS = st.text(max_size=8) | st.sampled_from(
    [
        "",
        "\ud800",
        "a\nb",
        "\u2028",
        "../../x",
        "/etc/passwd",
        "00000.zarr.zip",
        "sketch.zarr.zip",
        "vocabulary.zarr.zip",
        "step=0",
        "x" * 999,
    ]
)
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats() | st.sampled_from([1e-308, 1e308]) | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def findings_of(path: Path) -> list[Finding]:
    return verify_files(path) if (path / "manifest.json").exists() else []


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something can be changed."""
    found = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        found += places(inner, (*path, name))
    return found


def mutate(values: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """Replace, remove, add or move something, somewhere."""
    values = copy.deepcopy(values)
    for at, how, new in changes:
        all_places = places(values)
        if not all_places:
            break
        *way, last = all_places[at % len(all_places)]
        holder = values
        for name in way:
            holder = holder[name]
        if how == "remove":
            del holder[last]
        elif how == "replace":
            holder[last] = new
        elif how == "swap":
            *other_way, other = all_places[at // 7 % len(all_places)]
            taken = values
            for name in (*other_way, other):
                taken = taken[name]
            holder[last] = copy.deepcopy(taken)
        elif isinstance(holder, dict):
            holder[str(new)] = new
        else:
            holder.append(new)
    return values


def packed(values: Any, with_seal: bool) -> bytes:
    """The file; with a seal that fits, if JSON can hold the values at all."""
    if with_seal and isinstance(values, dict):
        values = {name: value for name, value in values.items() if name != "sha256"}
        try:
            return sealed._text(values | {"sha256": sealed._seal(values)})
        except ValueError:
            pass
    return json.dumps(values).encode()


ODD = (
    *("vocab_size", "samples", "tokens", "bytes", "axes", "step", "logprob_step", "window", "min_k", "top_k"),
    *("span", "sketch", "source", "name", "shard_samples", "vocabulary"),
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "remove", "add", "swap"]), VALUES),
    min_size=1,
    max_size=2,
)


def use(path: Path) -> None:
    """Everything that starts from a manifest; only CachekdErrors get through to here."""
    cache = None
    try:
        cache = LogitCache(path)
        for key in list(cache)[:1]:
            targets = cache[key]
            targets.everywhere()
            targets.leading(targets.window, targets.min_k)
            cache.sample_hash(key)
        _ = cache.vocabulary
    except CachekdError:
        pass
    for read in (dump_status, verify_files, strays):
        with contextlib.suppress(CachekdError):
            read(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory, skipping_cache) -> Path:
    return copied(skipping_cache, tmp_path_factory.mktemp("fuzz") / "c")


@FUZZ
@given(changes=CHANGES, with_seal=st.booleans())
def test_changed_manifests(small, skipping_cache, changes, with_seal):
    values = json.loads((skipping_cache / "manifest.json").read_bytes())
    (small / "manifest.json").write_bytes(packed(mutate(values, changes), with_seal))
    use(small)
    for command in (["verify"], ["status"], ["select", "--list"]):
        result = CliRunner().invoke(app, [command[0], str(small), *command[1:]])
        assert result.exception is None or isinstance(result.exception, CachekdError | SystemExit), result


@FUZZ
@given(name=st.sampled_from(ODD), new=VALUES)
def test_sealed_manifests_with_one_odd_value(small, skipping_cache, name, new):
    """What counts most, each value by itself and with a seal that fits."""
    values = json.loads((skipping_cache / "manifest.json").read_bytes())
    for way in [way for way in places(values) if way[-1] == name]:
        changed = copy.deepcopy(values)
        holder = changed
        for part in way[:-1]:
            holder = holder[part]
        holder[name] = new
        (small / "manifest.json").write_bytes(packed(changed, True))
        use(small)


@FUZZ
@given(content=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
@example(b"")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"\xff\xfe{}")
@example(b"\xef\xbb\xbf{}")
@example(b'{"format_version": 1, "format_version": 2}')
@example(b'{"format_version": ' + b"9" * 5000 + b"}")
@example(b'{"format_version": 1e400}')
@example(b'{"format_version": 99}')
@example(b'{"format_version": true}')
@example(b'{"\\ud800": 1, "format_version": 1}')
def test_any_bytes_as_manifest(small, content):
    (small / "manifest.json").write_bytes(content)
    with pytest.raises(CachekdError):
        Manifest.load(small)
    use(small)


@FUZZ
@given(
    cut=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=10)), min_size=1, max_size=3
    )
)
def test_manifests_with_bytes_exchanged(small, skipping_cache, cut):
    content = (skipping_cache / "manifest.json").read_bytes()
    for place, length, new in cut:
        start = int(place * len(content))
        content = content[:start] + new + content[start + length :]
    (small / "manifest.json").write_bytes(content)
    use(small)


@FUZZ
@given(
    name=st.sampled_from(["plan.json", "00000.json", "00001.json", "00002.json"]),
    changes=CHANGES,
    with_seal=st.booleans(),
    whole=st.booleans(),
)
def test_changed_plans_and_records(tmp_path_factory, skipping_cache, name, changes, with_seal, whole):
    """With and without a manifest beside them."""
    path = copied(skipping_cache, tmp_path_factory.mktemp("fuzz") / "c")
    values = json.loads((path / "dump" / name).read_bytes())
    (path / "dump" / name).write_bytes(packed(mutate(values, changes), with_seal))
    if not whole:
        (path / "manifest.json").unlink()
    use(path)
    with contextlib.suppress(CachekdError):
        repair(path, findings_of(path), lambda plan: None)
    shutil.rmtree(path)


@FUZZ
@given(content=st.binary(max_size=80) | VALUES.map(lambda value: json.dumps(value).encode() + b"\n"))
@example(b'{"key": "a", "reason": "\xff"}\n')
@example(b'{"key": "a", "reason": "\\ud800"}\n')
@example(b"[" * 100_000 + b"\n")
@example(b'{"key": "a", "reason": "b"}')
def test_any_skipped_file_with_a_checksum_that_fits(small, skipping_cache, content):
    values = json.loads((skipping_cache / "manifest.json").read_bytes())
    sha256 = hashlib.sha256(content).hexdigest()
    values["skipped"] = {"samples": 1, "bytes": max(1, len(content)), "sha256": sha256}
    (small / "manifest.json").write_bytes(packed(values, True))
    (small / "skipped.jsonl").write_bytes(content)
    with contextlib.suppress(CachekdError):
        verify_files(small)
    out = small.parent / "out"
    try:
        select_samples(small, out, {"s000"})
        shutil.rmtree(out)
    except CachekdError:
        assert not out.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../manifest.json",
        "/etc/passwd",
        "..",
        "a/../../x.zarr.zip",
        "00000.zarr.zip/../x",
        "00000.zarr.zip\n",
        "٠٠٠٠٠.zarr.zip",
    ],
)
def test_names_lead_nowhere_else(tmp_path, skipping_cache, name):
    path = copied(skipping_cache, tmp_path / "c")
    values = json.loads((path / "manifest.json").read_bytes())
    for part in ("shards", "sketches"):
        changed = copy.deepcopy(values)
        changed[part][0]["name"] = name
        (path / "manifest.json").write_bytes(packed(changed, True))
        for act in (
            Manifest.load,
            LogitCache,
            verify_files,
            lambda path: merge_caches([path, path], tmp_path / "o"),
        ):
            with pytest.raises(CachekdError, match="cannot be read"):
                act(path)


def test_endless_plans_take_no_time(tmp_path, skipping_cache):
    """A plan of 2**53 shards is looked at by what is there, not by what might be."""
    path = copied(skipping_cache, tmp_path / "c")
    for file in ("dump/plan.json", "manifest.json"):
        values = json.loads((path / file).read_bytes())
        source = values["source"] if "source" in values else values["sources"][0]
        source["data"]["samples"] = 2**53
        source["geometry"]["shard_samples"] = 1
        (path / file).write_bytes(packed(values, True))
    use(path)
    (path / "manifest.json").unlink()
    assert dump_status(path).all_shards == 2**53
    assert repair(path, [], lambda plan: None).plan.shards == 2**53


@pytest.mark.parametrize("kind", [Manifest, Plan, FinishedShard])
def test_a_seal_is_over_every_value(skipping_cache, tmp_path, kind):
    """Each single value changed, the seal left: refused."""
    name = {Manifest: "manifest.json", Plan: "dump/plan.json", FinishedShard: "dump/00001.json"}[kind]
    values = json.loads((skipping_cache / name).read_bytes())
    file, generator = tmp_path / "x.json", random.Random(0)
    for way in places(values):
        changed = copy.deepcopy(values)
        holder = changed
        for part in way[:-1]:
            holder = holder[part]
        holder[way[-1]] = generator.choice([None, 7, "other", 0.125])
        if changed != values:
            file.write_bytes(json.dumps(changed).encode())
            with pytest.raises(CachekdError):
                kind.read(file)
