"""Edits of a sealed cache, made from the tables by which it is read: each breaks one rule, or none."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cachekd.cache.array_rules import ArrayRule
from cachekd.cache.shard_rules import RULES, SKETCH_RULES
from cachekd.cache.tail.encoder import RULES as ENCODER_RULES
from cachekd.cache.tail.sketch import RULES as TAIL_RULES
from cachekd.cache.vocabulary import RULES as VOCABULARY_RULES

Arrays = dict[str, np.ndarray]
Edit = Callable[[Arrays], Any]
SHARD = {**RULES, **SKETCH_RULES}
SKETCH = {**TAIL_RULES, **ENCODER_RULES}
VOCABULARY = dict(VOCABULARY_RULES)
TYPES = ("uint8", "uint16", "uint32", "int16", "float32", "float64")


def set_to(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    return lambda arrays: arrays.update({name: change(arrays[name])})


def put(name: str, place: Any, value: Any) -> Edit:
    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value(arrays) if callable(value) else value

    return change


def by_the_table(rules: dict[str, ArrayRule]) -> dict[str, Edit]:
    """Of each array: every other type, a shape that is longer, shorter, empty or has another dimension, what
    is below and above its range, out of order or not finite; and none of it."""
    edits: dict[str, Edit] = {}
    for name, rule in rules.items():
        for other in TYPES:
            if other not in rule.types:
                edits[f"{name} as {other}"] = set_to(name, lambda a, to=other: np.abs(a).astype(to))
        edits[f"{name} is missing"] = lambda arrays, name=name: arrays.pop(name)
        if name == "softcap":  # is empty: below
            continue
        edits[f"{name} is longer"] = set_to(name, lambda a: np.concatenate([a, a[-1:]]))
        edits[f"{name} is shorter"] = set_to(name, lambda a: a[:-1])
        edits[f"{name} is empty"] = set_to(name, lambda a: a[:0])
        other = set_to(name, lambda a: a[None] if a.ndim == 1 else a[0].copy())
        edits[f"{name} has another dimension"] = other
        first = (0,) * len(rule.shape)
        if rule.least is not None:
            edits[f"{name} is too small"] = put(name, first, rule.least - 1 if rule.least else -1)
        if rule.below == "ranked":
            edits[f"{name} is too large"] = put(name, first, lambda arrays: len(arrays["ranked_ids"]))
        elif rule.below is not None or rule.most is not None:
            edits[f"{name} is too large"] = put(name, first, 60_000)
        if rule.order is not None:
            edits[f"{name} has a value twice"] = put(name, 1, lambda arrays, name=name: arrays[name][0])
        if rule.order == "ascending":
            edits[f"{name} runs backwards"] = set_to(name, lambda a: a[::-1].copy())
        if rule.types[0].startswith("float"):
            edits[f"{name} is not a number"] = set_to(name, lambda a: np.full_like(a, np.nan))
            edits[f"{name} is infinite"] = set_to(name, lambda a: np.full_like(a, np.inf))
    return edits


def no_tokens_in_the_last(arrays: Arrays) -> None:
    arrays["sample_offsets"] = arrays["sample_offsets"].copy()
    arrays["sample_offsets"][-2] = arrays["sample_offsets"][-1]


def an_entry_more_for_less(arrays: Arrays) -> None:
    arrays["k"] = arrays["k"].copy()
    arrays["k"][0] -= 1
    arrays["k"][1] += 1


def keys(*changed: Any) -> Edit:
    def change(arrays: Arrays) -> None:
        there = arrays["sample_keys"].tobytes().split(b"\n")
        for place, key in changed:
            there[place] = there[key] if isinstance(key, int) else key
        arrays["sample_keys"] = np.frombuffer(b"\n".join(there), "u1")

    return change


OF_MORE_THAN_ONE: dict[str, Edit] = {
    "an id twice in a token": lambda arrays: put("topk_ranks", 1, arrays["topk_ranks"][0])(arrays),
    "an id twice in every token": set_to("topk_ranks", np.zeros_like),
    "the last sample without tokens": no_tokens_in_the_last,
    "the first sample without tokens": put("sample_offsets", 1, 0),
    "offsets that begin later": put("sample_offsets", 0, 1),
    "offsets that end earlier": put("sample_offsets", -1, lambda arrays: len(arrays["k"]) - 1),
    "a knee below nothing": put("beyond_knee", 0, 65_535),
    "a token with no entry": put("k", 0, 0),
    "an entry that moves to the next token": an_entry_more_for_less,
    "a key twice": keys((1, 0)),
    "a key that is no text": keys((0, b"\xff\xfe")),
    "a key with a line feed": keys((0, b"a\nb")),
    "a heavier tail": set_to("tail", lambda a: np.full_like(a, 32_767)),
    "no tail at all": set_to("tail", lambda a: np.full_like(a, -(2**15))),
    "a first gap of nothing": set_to("topk_gaps", lambda a: np.zeros_like(a)),
    "the largest gaps": set_to("topk_gaps", lambda a: np.full_like(a, 65_535)),
    "a first logprob that is less": put("topk_gaps", 0, 9_000),
}


SOFTCAPS: dict[str, Edit] = {
    f"softcap of {values}": lambda arrays, values=values: arrays.update(softcap=np.array(values))
    for values in ([0.0], [-1.0], [np.nan], [np.inf], [30.0, 30.0])
}
OF_THE_SKETCH: dict[str, Edit] = {
    **SOFTCAPS,
    "a basis that overflows": put("basis_step", 0, 1e9),
    "units that overflow": set_to("unit", lambda a: np.full_like(a, 3e38)),
    "centroids that overflow": set_to("centroids", lambda a: np.full_like(a, 3e38)),
    "another step": put("numbers", 0, 0.7),
    "other calibration tokens": put("numbers", 2, 61.0),
}


OF_THE_VOCABULARY: dict[str, Edit] = {
    "a byte that moves to the next id": set_to(
        "lengths", lambda a: np.concatenate([a[:-2], [a[-2] + 1, a[-1] - 1]]).astype(a.dtype)
    ),
    "an id that is longer": put("lengths", 0, 65_535),
    "two ends of a turn": set_to("end_of_turn", lambda a: np.concatenate([a, a])),
    "an end of a turn beyond the ids": put("end_of_turn", 0, 2**32 - 1),
    "a name beyond the ids": put("special", -1, 2**32 - 1),
}


# ---- the manifest: a way to a value, and another value


def at(*way: Any) -> Callable[[Any], tuple[Any, Any]]:
    def find(values: Any) -> tuple[Any, Any]:
        for name in way[:-1]:
            values = values[name]
        return values, way[-1]

    return find


def of_the_manifest(values: Any) -> dict[str, Callable[[Any], None]]:
    """Each number as text, with a fraction, as a truth value, less than nothing, and beyond range; each text
    as a number; each field left out; and what contradicts what."""
    edits: dict[str, Callable[[Any], None]] = {}
    parts = {
        "": (),
        **{f"{name} ": (name,) for name in ("teacher", "fingerprints", "codec", "vocabulary", "skipped")},
    }
    parts |= {"data ": ("sources", 0, "data"), "geometry ": ("sources", 0, "geometry")}
    parts |= {"shard ": ("shards", 0), "sketch ": ("sketches", 0)}
    for part, way in parts.items():
        holder = values
        for name in way:
            holder = holder[name]
        for field, value in holder.items():
            find = at(*way, field)
            if field == "sha256" and not way:
                continue
            for kind, new in _others(value).items():

                def change(values: Any, find: Any = find, new: Any = new) -> None:
                    inside, name = find(values)
                    inside[name] = new

                edits[f"{part}{field} {kind}"] = change
    return edits


def _others(value: Any) -> dict[str, Any]:
    if isinstance(value, int):
        return {
            "as text": str(value),
            "with a fraction": float(value),
            "as a truth value": True,
            "less than nothing": -1,
            "beyond range": 2**53 + 1,
        }
    if isinstance(value, float):
        return {"as text": str(value), "less than nothing": -1.0, "without end": 1e300}
    if isinstance(value, str):
        return {"as a number": 7, "as a list": [value]}
    return {"as a number": 7}


def _shard(**changes: Any) -> Callable[[Any], None]:
    return lambda values: values["shards"][0].update(changes)


CONTRADICTIONS: dict[str, Callable[[Any], None]] = {
    "spans that overlap": lambda v: v["shards"][1].update(span=v["shards"][0]["span"]),
    "a span that runs backwards": lambda v: _shard(span=v["shards"][0]["span"][::-1])(v),
    "a span of nothing": _shard(span=[0, 0]),
    "a span beyond the data": lambda v: v["shards"][-1].update(span=[18, 24]),
    "a span between the shards": _shard(span=[1, 6]),
    "a span of two shards": _shard(span=[0, 12]),
    "a span of fractions": _shard(span=[0.0, 6.0]),
    "a span of text": _shard(span="06"),
    "spans without a geometry": lambda v: v["sources"][0].update(geometry=None),
    "more samples than the span": _shard(samples=7),
    "fewer tokens than samples": _shard(tokens=1),
    "fewer entries than tokens": _shard(entries=1),
    "more entries than top_k allows": lambda v: _shard(entries=v["codec"]["top_k"] * 10**6)(v),
    "more without images than there are": _shard(without_image=99),
    "more cut than there are": _shard(cut=99),
    "measured at more tokens than there are": lambda v: v["shards"][0]["fidelity"].update(tokens=10**6),
    "one token more": lambda v: _shard(tokens=v["shards"][0]["tokens"] + 1)(v),
    "one entry more": lambda v: _shard(entries=v["shards"][0]["entries"] + 1)(v),
    "one axis more": lambda v: v["sketches"][0].update(axes=v["sketches"][0]["axes"] + 1),
    "another step of the sketch": lambda v: v["sketches"][0].update(step=0.123),
    "one calibration token more": lambda v: v["sketches"][0].update(calibration_tokens=61),
    "a larger vocabulary": lambda v: v["teacher"].update(vocab_size=v["teacher"]["vocab_size"] + 1),
    "a smaller vocabulary": lambda v: v["teacher"].update(vocab_size=10),
    "one token id more": lambda v: v["vocabulary"].update(tokens=v["vocabulary"]["tokens"] + 1),
    "a vocabulary that is kept back": lambda v: v.pop("vocabulary"),
    "a smaller top_k": lambda v: v["codec"].update(top_k=3),
    "another step of the logprobs": lambda v: v["codec"].update(logprob_step=0.5),
    "no tail, with a sketch": lambda v: v["codec"].update(tail="none"),
    "a sketch that is kept back": lambda v: [
        v.update(sketches=[]),
        [shard.update(sketch=None) for shard in v["shards"]],
    ],
    "a shard without its sketch": _shard(sketch=None),
    "a sketch that is not there": _shard(sketch=1),
    "a source that is not there": _shard(source=1),
    "a shard twice": lambda v: v["shards"].append(copy.deepcopy(v["shards"][0])),
    "a shard's keys are others": _shard(samples_sha256="0" * 64),
    "no shards": lambda v: v.update(shards=[]),
    "an unknown field": lambda v: v.update(later=1),
    "an unknown field of a shard": _shard(later=1),
    "another sample left out": lambda v: v["skipped"].update(samples=1),
}


# ---- what is not even parsed


def many_values(item: bytes, count: int) -> Callable[[Path], None]:
    content = b'{"format_version": 1, "shards": [' + b",".join([item] * count) + b"]}"
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def many_fields(folder: Path) -> None:
    values = {"format_version": 1, **{f"field {number}": 0 for number in range(300_000)}}
    (folder / "manifest.json").write_bytes(json.dumps(values).encode())


def many_members(content: bytes, count: int) -> bytes:
    """A zip with as many more in its list, all of nothing; in the form for more than 65,535 if it must."""
    end = content.rfind(b"PK\5\6")
    entries, size, offset = struct.unpack("<HII", content[end + 10 : end + 20])
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, 1, *[0] * 6) + b"x"
    listed = content[offset : offset + size] + entry * count
    total, at_64 = entries + count, offset + len(listed)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, total, total, len(listed), offset)
    wide += struct.pack("<4sLQL", b"PK\6\7", 0, at_64, 1)
    few = min(total, 2**16 - 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, len(listed), offset, 0)
    return content[:offset] + listed + (wide if total > few else b"") + last
