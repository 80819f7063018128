"""Caches made to harm, by somebody who knows the format and seals them well: each is refused, or harmless."""

from __future__ import annotations

import ast
import io
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs.blosc import Blosc
from numcodecs.checksum32 import CRC32C
from pcodec import ChunkConfig, standalone

import hostile_edits
from cachekd.cache.container import pack_arrays, read_arrays
from cachekd.cache.layout import VOCABULARY_FILE
from cachekd.cache.shard import pack_codes, read_codes
from cachekd.cache.vocabulary import VOCABULARY_FORMAT
from caches import GOLDEN, ROOT, copied, files_of, flip, reseal

SPARE = 512 * 2**20  # bytes of address space that reading may take, whatever the file says
BLOWN_UP = 20  # times the decoded arrays: what reading takes at the most, in passing
SHARD = "shards/00000.zarr.zip"
Members = dict[str, bytes]

# Runs with the library warm, little memory and an audit hook; says what became of each folder.
USE = """
import hashlib, json, os, re, resource, sys, time
from pathlib import Path
from cachekd.cache import LogitCache, verify_files
from cachekd.cache.subset import select_chosen, with_keys
from cachekd.errors import CachekdError

def findings(folder):  # verify reports what is wrong; must not fall over it
    try:
        return len(verify_files(folder))
    except CachekdError:
        return 1

def use(folder, out, values):
    cache = LogitCache(folder)
    seen = hashlib.sha256()
    seen.update(repr(cache.vocabulary).encode())
    for number in range(len(cache.manifest.shards)):
        cache.sketch(cache.manifest.shards[number].sketch)
        cache.shard_targets(number)
    for key in cache:
        targets = cache[key]
        targets.gather(targets.token_ids[:, None])
        seen.update(key.encode() + cache.sample_hash(key))
        if values:
            for tensor in (targets.token_ids, targets.k, targets.knee, targets.everywhere()):
                seen.update(tensor.numpy().tobytes())
    select_chosen(cache, out, with_keys(cache, set(list(cache)[:1]).__contains__))
    return seen.hexdigest()

def outcome(folder, out):
    wrong = None
    try:
        wrong = findings(folder)
        return ["read", use(folder, out, not out.name.startswith("swollen")), wrong]
    except CachekdError as error:
        return ["refused", str(error), wrong]
    except BaseException as error:
        return [type(error).__name__, str(error)[:300], wrong]

jobs, warm = json.loads(sys.argv[1]), sys.argv[2].split(",")
for place, folder in enumerate(warm):
    assert outcome(Path(folder), Path(sys.argv[3]) / f"warm-{place}")[::2] == ["read", 0]
seen = []
FORBIDDEN = ("pickle.", "marshal.", "exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn",
             "os.fork", "subprocess.", "socket.", "ctypes.", "code.__new__", "shutil.unpack_archive")

def hook(event, args):
    if event.startswith(FORBIDDEN) and event != "import":
        seen.append([event, repr(args)[:200]])

sys.addaudithook(hook)
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
found = {}
for name, folder in jobs.items():
    print(name, file=sys.stderr, flush=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    kind, message, wrong = outcome(Path(folder), Path(sys.argv[3]) / name.replace("/", " "))
    taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    found[name] = [kind, message, taken, wrong, time.process_time() - started]
print(json.dumps({"found": found, "seen": seen}))
"""


def run(jobs: dict[str, Path], tmp_path: Path, warm: list[Path]) -> dict[str, list]:
    """What became of each; nothing may have been executed, nor taken more memory than there is."""
    folders = json.dumps({name: str(folder) for name, folder in jobs.items()})
    (tmp_path / "out").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", USE, folders, ",".join(map(str, warm)), str(tmp_path / "out"), str(SPARE)],
        capture_output=True,
        timeout=300,
        check=False,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["seen"] == []
    return answer["found"]


# ---- tools of the trade


def members_of(file: Path) -> Members:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def stored_zip(members: Members, compressed: tuple[str, ...] = ()) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            kind = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, kind)
    return stream.getvalue()


def replace_file(folder: Path, name: str, content: bytes, **counts: int) -> None:
    """A file of the cache, with size and checksum in the manifest that fit."""
    (folder / name).write_bytes(content)

    def change(values: Any) -> None:
        for info in (*values["shards"], *values["sketches"], values["vocabulary"]):
            if name.endswith(info["name"]):
                info |= {"bytes": len(content), "sha256": sha256(content).hexdigest(), **counts}

    reseal(folder / "manifest.json", change)


def with_members(folder: Path, change: Callable[[Members], None], name: str = SHARD) -> None:
    members = members_of(folder / name)
    change(members)
    replace_file(folder, name, stored_zip(members))


def claim(array: str, **changes: Any) -> Callable[[Members], None]:
    """Another zarr.json."""

    def change(members: Members) -> None:
        values = json.loads(members[f"{array}/zarr.json"]) | changes
        if "shape" in changes and "chunk_grid" not in changes:
            values["chunk_grid"]["configuration"]["chunk_shape"] = changes["shape"]
        members[f"{array}/zarr.json"] = json.dumps(values).encode()

    return change


def chunk(array: str, content: bytes, key: str = "c/0") -> Callable[[Members], None]:
    """Another chunk, with a checksum that fits."""
    return lambda members: members.update({f"{array}/{key}": bytes(CRC32C().encode(content))})


def zeros(count: int, dtype: str = "<u2") -> bytes:
    return bytes(standalone.simple_compress(np.zeros(count, dtype), ChunkConfig()))


def blosc_that_claims(size: int) -> bytes:
    frame = bytearray(Blosc(cname="zstd").encode(bytes(100)))
    frame[4:8] = size.to_bytes(4, "little")
    return bytes(frame)


def recoded(folder: Path, change: Callable[[dict[str, np.ndarray]], None], **counts: int) -> None:
    """Other codes in a file that is otherwise sound."""
    name = SHARD
    arrays = read_codes(folder / name, sketch=True)
    change(arrays)
    replace_file(folder, name, pack_codes(arrays), **counts)


def other_sketch(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from cachekd.cache.tail.encoder import read_encoder
        from cachekd.cache.tail.sketch import SKETCH_FORMAT

        encoder = read_encoder(folder / "sketch.zarr.zip")
        arrays = {**encoder.sketch.arrays(), "analysis": encoder.analysis.numpy()}
        arrays |= {"mean": encoder.mean.numpy(), "common": encoder.common[0].numpy()}
        arrays["numbers"] = np.array([encoder.step, 0.0, 60.0, 0.0])
        arrays[name] = np.full_like(arrays[name], value) if np.isscalar(value) else value
        replace_file(folder, "sketch.zarr.zip", pack_arrays(arrays, SKETCH_FORMAT))

    return change


def manifest(change: Callable[[Any], None]) -> Callable[[Path], None]:
    return lambda folder: reseal(folder / "manifest.json", change)


def text(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def sparse(name: str) -> Callable[[Path], None]:
    """A file of a terabyte that takes no space, and a manifest that says so."""

    def change(folder: Path) -> None:
        os.truncate(folder / name, 2**40)
        if name != "manifest.json":
            reseal(folder / "manifest.json", lambda values: _all_files(values, name, 2**40))

    return change


def _all_files(values: Any, name: str, size: int) -> None:
    for info in (*values["shards"], *values["sketches"], values["vocabulary"], values["skipped"]):
        if name.endswith(info.get("name", "skipped.jsonl")):
            info["bytes"] = size


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def in_shard(change: Callable[[Members], None]) -> Callable[[Path], None]:
    return lambda folder: with_members(folder, change)


def in_sketch(change: Callable[[Members], None]) -> Callable[[Path], None]:
    return lambda folder: with_members(folder, change, "sketch.zarr.zip")


def in_vocabulary(change: Callable[[Members], None]) -> Callable[[Path], None]:
    return lambda folder: with_members(folder, change, VOCABULARY_FILE)


def other_vocabulary(**counts: int) -> Callable[..., Callable[[Path], None]]:
    """Other arrays, with counts in the manifest that fit."""

    def with_arrays(**changed: np.ndarray) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            arrays = read_arrays(folder / VOCABULARY_FILE, list(hostile_edits.VOCABULARY), {})
            content = pack_arrays({**arrays, **changed}, VOCABULARY_FORMAT)
            replace_file(folder, VOCABULARY_FILE, content, **counts)

        return change

    return with_arrays


def compressed(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        members = members_of(folder / SHARD)
        members[names[0]] = members[names[0]] + b" " * (20 * 2**20 if names[0].endswith("json") else 0)
        replace_file(folder, SHARD, stored_zip(members, names))

    return change


def twice(folder: Path) -> None:
    members = members_of(folder / SHARD)
    stream = io.BytesIO(stored_zip(members))
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("k/c/0", members["k/c/0"])
    replace_file(folder, SHARD, stream.getvalue())


def huge_claims(folder: Path) -> None:
    """Manifest, shapes and frames agree: half a trillion tokens in some kilobytes."""
    size = 2**39
    with_members(folder, lambda members: [claim(name, shape=[size])(members) for name in ("k", "tail")])
    content = (folder / SHARD).read_bytes()
    replace_file(folder, SHARD, content, tokens=size, entries=size)
    members = members_of(folder / SHARD)
    for name in ("token_ids", "beyond_knee", "sketch_shift", "topk_ranks", "topk_gaps"):
        claim(name, shape=[size])(members)
    axes = json.loads(members["sketch_coordinates/zarr.json"])["shape"][0]
    claim("sketch_coordinates", shape=[axes, size])(members)
    replace_file(folder, SHARD, stored_zip(members))


def one_long_row(folder: Path) -> None:
    """A token with 65,535 entries makes 20,000 rows as long."""
    arrays = one_entry_each(folder, 20_000)
    arrays["k"][0], entries = 65_535, 65_535 + 19_999
    arrays |= {"topk_gaps": np.zeros(entries, "<u2"), "topk_ranks": np.zeros(entries, "<u2")}
    replace_file(folder, SHARD, pack_codes(arrays), tokens=20_000, entries=entries)


def deep(name: str) -> Callable[[Path], None]:
    return in_shard(lambda members: members.update({name: b'{"attributes":' * 4000 + b"1" + b"}" * 4000}))


def nan_of(values: Any) -> None:
    values["codec"]["logprob_step"] = float("nan")


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    # sizes that are claimed
    "a shape of 2**39 in one array": (in_shard(claim("k", shape=[2**39])), "has shape"),
    "a shape of 2**40": (in_shard(claim("k", shape=[2**40])), "has shape"),
    "a shape of 10**400": (in_shard(claim("k", shape=[10**400])), "has shape"),
    "a negative shape": (in_shard(claim("k", shape=[-1])), "has shape"),
    "keys without end": (in_shard(claim("sample_keys", shape=[2**36])), "claim to hold"),
    "ids without end": (in_shard(claim("ranked_ids", shape=[2**36])), "claim to hold"),
    "a basis of 2**39": (in_sketch(claim("basis", shape=[2**20, 2**19])), "has shape"),
    "all claims agree": (huge_claims, "claim to hold"),
    "one row makes all long": (one_long_row, "(top_k)"),
    "a vocabulary without end": (
        manifest(lambda v: [v["teacher"].update(vocab_size=2**31 - 1), v.pop("vocabulary")]),
        "has shape",
    ),
    "as many axes": (manifest(lambda values: values["sketches"][0].update(axes=2**50)), "has shape"),
    # frames that hold something else than the shape says
    "a frame of ten million numbers": (in_shard(chunk("k", zeros(10**7))), "does not hold"),
    "a frame of too few": (in_shard(chunk("k", zeros(1))), "does not hold"),
    "an empty frame": (in_shard(chunk("k", zeros(0))), "does not hold"),
    "a frame of another type": (in_shard(chunk("k", zeros(9, "<u4"))), "damaged"),
    "no frame": (in_shard(chunk("k", b"pco!" + bytes(range(200)))), "damaged"),
    "blosc claims two gigabytes": (in_shard(chunk("sample_keys", blosc_that_claims(2**31 - 1))), "hold"),
    "blosc claims too little": (in_shard(chunk("sample_keys", blosc_that_claims(3))), "does not hold"),
    "blosc of nothing": (in_shard(chunk("sample_keys", b"")), "damaged"),
    # the container
    "a zip bomb in place of metadata": (compressed("k/zarr.json"), "zip bomb"),
    "a compressed chunk": (compressed("k/c/0"), "zip bomb"),
    "a member twice": (twice, "twice"),
    "a zarr.json of a megabyte": (in_shard(claim("k", attributes={"x": "y" * 2**20})), "a zarr.json of"),
    "a deep zarr.json": (deep("k/zarr.json"), "damaged"),
    "a deep group": (deep("zarr.json"), "damaged"),
    "a codec that unpickles": (in_shard(claim("k", codecs=[{"name": "numcodecs.pickle"}])), "has codecs"),
    "a codec of somebody's": (in_shard(claim("k", codecs=[{"name": "evil", "configuration": {}}])), "codecs"),
    "codecs that are none": (in_shard(claim("k", codecs={"name": "crc32c"})), "has codecs"),
    "gzip": (in_shard(claim("k", codecs=[{"name": "bytes"}, {"name": "gzip"}])), "has codecs"),
    "strings": (in_shard(claim("k", data_type="string")), "is of type"),
    "a type that is an object": (in_shard(claim("k", data_type={"name": "object"})), "is of type"),
    "many chunks": (
        in_shard(claim("k", chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1]}})),
        "not in one chunk",
    ),
    "a storage transformer": (in_shard(claim("k", storage_transformers=[{"name": "x"}])), "transformers"),
    "not a zip": (lambda folder: replace_file(folder, SHARD, b"PK" * 99), "damaged"),
    # values
    "offsets that go back": (
        lambda folder: recoded(folder, lambda arrays: arrays["sample_offsets"].__setitem__(1, 2**32 - 1)),
        "sample_offsets",
    ),
    "a negative knee": (
        lambda folder: recoded(folder, lambda arrays: arrays["beyond_knee"].__setitem__(0, 65_535)),
        "knee",
    ),
    "ranks beyond the ids": (
        lambda folder: recoded(folder, lambda arrays: arrays["topk_ranks"].__setitem__(0, 65_535)),
        "(ranked)",
    ),
    "ids beyond the vocabulary": (
        lambda folder: recoded(folder, lambda arrays: arrays["ranked_ids"].__setitem__(0, 2**32 - 1)),
        "(vocab_size)",
    ),
    "keys that are no text": (
        lambda folder: recoded(folder, lambda arrays: arrays["sample_keys"].__setitem__(0, 255)),
        "damaged",
    ),
    "NaN in a sketch": (other_sketch("offset", np.nan), "not finite"),
    "infinity in a sketch": (other_sketch("unit", np.inf), "not finite"),
    "a cap of zero": (other_sketch("softcap", np.zeros(1)), "softcap"),
    "many caps": (other_sketch("softcap", np.ones(7)), "softcap"),
    # what ids stand for
    "contents without end": (in_vocabulary(claim("contents", shape=[2**36])), "has shape"),
    "names without end": (in_vocabulary(claim("special", shape=[2**36])), "claim to hold"),
    "ids as zeros without end": (
        other_vocabulary(tokens=2**21)(lengths=np.full(2**21, 65_535, "<u2")),
        "lengths add up to 137,436,856,320",
    ),
    "more ids than there may be": (
        manifest(lambda values: values["vocabulary"].update(tokens=2**21 + 1)),
        "vocabulary.tokens",
    ),
    "fewer ids than the teacher has": (
        manifest(lambda values: values["vocabulary"].update(tokens=7)),
        "vocabulary has 7 tokens of",
    ),
    "a vocabulary of another name": (
        manifest(lambda values: values["vocabulary"].update(name="../x.zarr.zip")),
        "vocabulary.name",
    ),
    "a vocabulary that is a sketch": (
        lambda folder: replace_file(folder, VOCABULARY_FILE, (folder / "sketch.zarr.zip").read_bytes()),
        "cachekd-vocabulary",
    ),
    # the manifest
    "NaN in the manifest": (text(json.dumps({"format_version": 1, "x": float("nan")}).encode()), "cannot be"),
    "a manifest without end": (sparse("manifest.json"), "at most"),
    "a deep manifest": (text(b"[" * 10**6), "cannot be read"),
    "numbers beyond range": (manifest(lambda values: values["shards"][0].update(tokens=2**60)), "cannot be"),
    "a name that leads out": (
        manifest(lambda values: values["shards"][0].update(name="../../x.zarr.zip")),
        "cannot be read",
    ),
    "a step of zero": (manifest(lambda values: values["codec"].update(logprob_step=0)), "cannot be read"),
    "a checksum that does not fit": (lambda folder: flip(folder / SHARD, 700), "sha256"),
    # what is no file
    "a shard without end": (sparse(SHARD), "damaged"),
    "a list of skipped samples without end": (sparse("skipped.jsonl"), "skipped.jsonl is not"),
    "a device": (instead(SHARD, lambda at: at.symlink_to("/dev/zero")), "is missing"),
    "a pipe": (instead(SHARD, os.mkfifo), "is missing"),
    "a pipe as sketch": (instead("sketch.zarr.zip", os.mkfifo), "is missing"),
    "a pipe as vocabulary": (instead(VOCABULARY_FILE, os.mkfifo), "is missing"),
    "a file of ids without end": (sparse(VOCABULARY_FILE), "damaged"),
    "a pipe as manifest": (instead("manifest.json", os.mkfifo), "did not finish"),
    "a device as manifest": (instead("manifest.json", lambda at: at.symlink_to("/dev/zero")), "did not fin"),
    "a link to a secret": (instead("sketch.zarr.zip", lambda at: at.symlink_to("/etc/passwd")), "cut short"),
    "a folder": (instead(SHARD, os.mkdir), "is missing"),
}
HARMLESS: dict[str, Callable[[Path], Any]] = {
    "members that lead out": in_shard(
        lambda members: members.update({"../../../evil": b"x", "/tmp/cachekd-evil": b"x", "k/../evil": b"x"})
    ),
    "arrays and attributes that nobody asked for": in_shard(
        lambda members: members.update({"evil/zarr.json": b"\xff", "evil/c/0": b"x" * 10_000})
    ),
    "numbers of an encoder that are none": other_sketch("numbers", np.nan),
    "too few numbers of an encoder": other_sketch("numbers", np.ones(2)),
    "a pipe as a record": instead("dump/00001.json", os.mkfifo),
    "a device as a plan": instead("dump/plan.json", lambda at: at.symlink_to("/dev/zero")),
    "code beside it": lambda folder: (folder / "zarr.py").write_text("raise SystemExit(9)"),
}


def swollen(folder: Path) -> int:
    """Zeros pack without end, and some megabytes of them are within the format; returns the arrays' bytes."""
    arrays = one_entry_each(folder, 2**18)
    content = pack_codes(arrays)
    decoded = sum(values.nbytes for values in arrays.values())
    assert decoded > 50 * len(content)
    replace_file(folder, SHARD, content, tokens=2**18, entries=2**18)
    return decoded


def one_entry_each(folder: Path, tokens: int) -> dict[str, np.ndarray]:
    """A shard's arrays, with as many tokens, which keep half of their mass in one entry."""
    arrays = read_codes(folder / SHARD, sketch=True)
    axes, samples = len(arrays["sketch_coordinates"]), len(arrays["sample_hashes"])
    arrays |= {name: np.zeros(tokens, arrays[name].dtype) for name in ("token_ids", "beyond_knee", "tail")}
    arrays |= {"k": np.ones(tokens, "<u2"), "topk_gaps": np.full(tokens, 11, "<u2")}
    arrays |= {"topk_ranks": np.zeros(tokens, "<u2"), "sketch_shift": np.zeros(tokens, "<i2")}
    arrays["sketch_coordinates"] = np.zeros((axes, tokens), "<i2")
    arrays["sample_offsets"] = np.array([*range(samples), tokens], "<u4")
    return arrays


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_hostile_caches_are_refused_in_little_memory(skipping_cache, tmp_path):
    folders = tmp_path / "in"
    jobs = {"swollen": copied(skipping_cache, folders / "swollen")}
    decoded = swollen(jobs["swollen"])
    changes = {**{name: change for name, (change, _) in HOSTILE.items()}, **HARMLESS}
    for place, (name, change) in enumerate(changes.items()):
        jobs[name] = copied(skipping_cache, folders / str(place))
        change(jobs[name])
    before = sorted(folders.rglob("*"))
    found = run(jobs, tmp_path, [GOLDEN, skipping_cache])
    assert sorted(folders.rglob("*")) == before
    assert not Path("/tmp/cachekd-evil").exists()
    for name, (_, expected) in HOSTILE.items():
        kind, message, _, wrong, _ = found[name]
        assert wrong, name  # what reading refuses, verify reports
        assert kind == "refused", (name, found[name])
        assert expected in message, (name, message)
        assert len(message) < 2_000, name
    for name in (*HARMLESS, "swollen"):
        assert found[name][0] == "read", (name, found[name])
    # The bound that the note states: memory follows from the manifest's counts.
    assert found["swollen"][2] <= BLOWN_UP * decoded + 32 * 2**20


# ---- edits by the tables, and the manifest's fields


def edited(base: tuple[Members, dict[str, np.ndarray]], name: str, edit: hostile_edits.Edit) -> Any:
    """The file with some other arrays; the others stay byte for byte."""

    def change(folder: Path) -> None:
        members, arrays = base
        new = dict(arrays)
        edit(new)
        changed = {key: value for key, value in new.items() if value is not arrays[key]}
        gone = {*changed, *(arrays.keys() - new.keys())}
        kept = {key: content for key, content in members.items() if key.split("/")[0] not in gone}
        there = zipfile.ZipFile(io.BytesIO(pack_arrays(changed, {})))
        parts = {key: there.read(key) for key in there.namelist() if key != "zarr.json"}
        counts = (
            {"tokens": len(new["k"])} if changed and len(new.get("k", ())) != len(arrays.get("k", ())) else {}
        )
        replace_file(folder, name, stored_zip(kept | parts), **counts)

    return change


def replaced_members(count: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        replace_file(folder, SHARD, hostile_edits.many_members((folder / SHARD).read_bytes(), count))

    return change


def skipped_lines(content: bytes, samples: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "skipped.jsonl").write_bytes(content)
        info = {"samples": samples, "bytes": len(content), "sha256": sha256(content).hexdigest()}
        reseal(folder / "manifest.json", lambda values: values.update(skipped=info))

    return change


def all_edits(path: Path) -> dict[str, Callable[[Path], Any]]:
    """By what they do."""
    shard = members_of(path / SHARD), read_arrays(path / SHARD, list(hostile_edits.SHARD), {})
    file = path / "sketch.zarr.zip"
    sketch = members_of(file), read_arrays(file, list(hostile_edits.SKETCH), {})
    file = path / VOCABULARY_FILE
    vocabulary = members_of(file), read_arrays(file, list(hostile_edits.VOCABULARY), {})
    values = json.loads((path / "manifest.json").read_bytes())
    found: dict[str, Callable[[Path], Any]] = {}
    of_shard = {**hostile_edits.by_the_table(hostile_edits.SHARD), **hostile_edits.OF_MORE_THAN_ONE}
    for name, edit in of_shard.items():
        found[f"shard: {name}"] = edited(shard, SHARD, edit)
    of_sketch = {**hostile_edits.by_the_table(hostile_edits.SKETCH), **hostile_edits.OF_THE_SKETCH}
    for name, edit in of_sketch.items():
        found[f"sketch: {name}"] = edited(sketch, "sketch.zarr.zip", edit)
    of_vocabulary = {
        **hostile_edits.by_the_table(hostile_edits.VOCABULARY),
        **hostile_edits.OF_THE_VOCABULARY,
    }
    for name, edit in of_vocabulary.items():
        found[f"vocabulary: {name}"] = edited(vocabulary, VOCABULARY_FILE, edit)
    fields = {**hostile_edits.of_the_manifest(values), **hostile_edits.CONTRADICTIONS}
    for name, change in fields.items():
        found[f"manifest: {name}"] = manifest(change)
    for name, item in (("lists", b"[]"), ("objects", b"{}"), ("numbers", b"7"), ("texts", b'"x"')):
        found[f"manifest: a million {name}"] = hostile_edits.many_values(item, 10**6)
        found[f"manifest: ten million {name}"] = hostile_edits.many_values(item, 8 * 10**6)
    found["manifest: many fields"] = hostile_edits.many_fields
    for count in (2_000, 60_000, 600_000):
        found[f"container: {count:,} members more"] = replaced_members(count)
    found["skipped: lines without end"] = skipped_lines(b"\n" * 2**27, 2**27)
    found["skipped: lines that are none"] = skipped_lines(b"[]\n" * 10**6, 10**6)
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("count", [60, pytest.param(None, marks=pytest.mark.slow)])
def test_what_is_accepted_reads_as_it_was(skipping_cache, tmp_path, count):
    """And whatever reading refuses, `verify` reports."""
    edits = all_edits(skipping_cache)
    chosen = sorted(edits) if count is None else random.Random(16).sample(sorted(edits), count)
    jobs = {"as it was": copied(skipping_cache, tmp_path / "in" / "whole")}
    for place, name in enumerate(chosen):
        jobs[name] = copied(skipping_cache, tmp_path / "in" / str(place))
        edits[name](jobs[name])
    before = sorted((tmp_path / "in").rglob("*"))
    found = run(jobs, tmp_path, [GOLDEN, skipping_cache])
    assert sorted((tmp_path / "in").rglob("*")) == before
    whole = found.pop("as it was")[1]
    problems = {
        name: (kind, said, wrong)
        for name, (kind, said, _, wrong, _) in found.items()
        if kind not in ("read", "refused")
        or (kind == "refused" and not wrong)
        or (kind == "read" and not wrong and said != whole)
    }
    assert problems == {}
    assert {name: seconds for name, (*_, seconds) in found.items() if seconds > 2} == {}
    assert len(found) >= (150 if count is None else count)
    assert sum(kind == "read" and not wrong for kind, _, _, wrong, _ in found.values()) < len(found) / 50


# ---- nothing that runs


CALLS = {"eval", "exec", "compile", "__import__"}
MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "subprocess",
    "ctypes",
    "importlib",
}
LOADS = {"torch.load", "np.load", "numpy.load", "os.system", "os.popen", "yaml.load", "pd.read_pickle"}
READERS = sorted(file for room in ("cache", "export") for file in (ROOT / "cachekd" / room).rglob("*.py"))


@pytest.mark.parametrize("file", READERS, ids=lambda file: file.name)
def test_nothing_that_reads_a_cache_can_run_what_is_in_it(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        # Our own version is read by `importlib.metadata`, which imports nothing.
        found = {name.split(".")[0] for name in names if name != "importlib.metadata"}
        assert not MODULES & found, (file, names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in CALLS | LOADS, (file, called)
            # The user's own --filter, by pandas' parser, is the only expression that is evaluated.
            assert not called.endswith(".eval") or file.name == "subset.py"
            assert not {word.arg for word in node.keywords} & {"allow_pickle", "shell"}


def test_the_check_itself_sees_what_it_looks_for(tmp_path):
    bad = tmp_path / "bad.py"
    for line in ("import pickle", "from marshal import loads", "torch.load(x)", "eval(x)", "f(shell=True)"):
        bad.write_text(line)
        with pytest.raises(AssertionError):
            test_nothing_that_reads_a_cache_can_run_what_is_in_it(bad)


def test_the_security_note_says_what_the_code_does():
    note = (ROOT / "docs" / "explanation" / "security.md").read_text()
    from cachekd.cache import array_rules, container, plan, sealed

    for value in (
        f"{container._FREE >> 20} MiB + {container._MOST_RATIO:,} times",
        f"{container.MOST_DECODED >> 30} GiB",
        f"{sealed.MOST_JSON >> 20} MiB",
        f"{plan.MOST_SKIPPED >> 20} MiB",
        f"{array_rules.MOST_METADATA >> 10} KiB for a zarr.json",
        f"{sealed.MOST_VALUES:,} values",
        f"{sealed.MOST_FIELDS} fields",
        f"{plan.MOST_LINES:,} lines",
        f"{container.MOST_DIRECTORY >> 10} KiB of a zip's list",
        f"{BLOWN_UP} times",
    ):
        assert re.search(rf"\b{re.escape(value)}", note), value


def test_a_derived_cache_takes_nothing_else_along(skipping_cache, tmp_path):
    """Strange members and files stay behind where a shard is cut."""
    from caches import select_samples

    folder = copied(skipping_cache, tmp_path / "c")
    HARMLESS["members that lead out"](folder)
    (folder / "evil.py").write_text("x")
    select_samples(folder, tmp_path / "out", {"s000"})
    assert not [name for name in files_of(tmp_path / "out") if "evil" in name]
    assert not [name for name in members_of(tmp_path / "out/shards/00000.zarr.zip") if "evil" in name]
