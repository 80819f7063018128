"""The settings of several runs beside each other, as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cachekd.config import TrainConfig
from cachekd.config.base import defaults_of
from cachekd.report.curves import best_step
from cachekd.report.runs import Run

_UNSET = "not set"
_FIRST = ("seed",)  # of interest even where it is equal
_SHARES = {"warmup", "data_wait", "held-out accuracy"}
_NAMED = {
    "steps": "optimizer steps",
    "resumed_from": "resumed from step",
    "data_wait": "time that the steps waited for data",
    "uncovered_samples": "samples without targets, by L_CE alone",
}


@dataclass(frozen=True)
class Setting:
    """A line of the table: a value for each run."""

    name: str
    values: list[str]


def settings_of(runs: Sequence[Run]) -> tuple[list[Setting], list[Setting]]:
    """Those to look at, and the others: of several runs those that differ, of one those that were set."""
    defaults = dict(_flat(defaults_of(TrainConfig)))
    all_values = [_values(run) for run in runs]
    names = list(dict.fromkeys([*_FIRST, *(name for values in all_values for name in values)]))
    shown: list[Setting] = []
    others: list[Setting] = []
    for name in names:
        values = [values.get(name) for values in all_values]
        if all(map(_is_unset, values)):
            continue
        differs = any(value != values[0] for value in values)
        to_look_at = differs if len(runs) > 1 else values[0] != defaults.get(name)
        setting = Setting(_NAMED.get(name, name), [as_read(name, value) for value in values])
        (shown if to_look_at or name in _FIRST else others).append(setting)
    return shown, others


def as_read(name: str, value: Any) -> str:
    """Write a value of JSON in words and figures."""
    if _is_unset(value):
        return _UNSET
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(as_read(name, one) for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_read(key, one)}" for key, one in value.items())
    if name in _SHARES:
        return f"{100 * value:.3g} %"
    if isinstance(value, int | float) and value == int(value) and not name.endswith("seed"):
        return f"{int(value):,}"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return f"{value} (beyond the paper)" if name == "switch_bridge" else str(value)


def _is_unset(value: Any) -> bool:
    return value is None or value in ("", [], {}, ())


def _values(run: Run) -> dict[str, Any]:
    saved = run.saved
    found: dict[str, Any] = {name: saved[name] for name in _NAMED if saved[name]}
    found["training time"] = f"{saved['seconds']:,.1f} s"
    found["best step on held-out data"] = best_step(run)
    held_out = saved.get("evaluation", {})  # there may be no such data
    found["held-out loss"] = held_out.get("eval_loss")
    found["held-out accuracy"] = held_out.get("eval_token_accuracy")
    for of, name in (("samples", "left_out"), ("held-out samples", "eval_left_out")):
        for why, left_out in saved.get(name, {}).items():
            found[f"{of} left out: {why}"] = left_out["samples"] or None
    versions = {f"{name} version": version for name, version in saved["versions"].items()}
    return dict(_flat(saved["config"])) | found | versions


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings within settings by their dotted names, as a message about them has them."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
