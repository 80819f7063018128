"""What a report reads: what runs saved, their scores, and their settings beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachekd.config import TrainConfig
from cachekd.config.base import defaults_of
from cachekd.config.weights import Schedule
from cachekd.errors import CachekdError
from cachekd.evaluate import Evaluation, read_scores
from cachekd.lmms.scores import BenchmarkScores, read_benchmarks
from cachekd.losses.terms import TERMS
from cachekd.paths import RUN_FILE, shortest

RUN_COLORS = [f"run-{number}" for number in range(1, 9)]  # names in the style sheet

_NEEDED = {"config", "versions", "cache", "k_histogram", "seconds", "steps", "resumed_from", "log"} | {
    "uncovered_samples",
    "left_out",
    "data_wait",
}


@dataclass(frozen=True)
class Run:
    """A run, as `cachekd train` and `cachekd eval` left it.

    Attributes:
        name: on the page.
        saved: what cachekd_run.json says.
        evaluations: one for each set of questions that it was asked, the newest first.
        benchmarks: the public ones that it was asked, by name.
        color: of its curves and bars, a name in the style sheet.
    """

    folder: Path
    name: str
    saved: dict[str, Any]
    evaluations: list[Evaluation]
    benchmarks: list[BenchmarkScores]
    color: str = RUN_COLORS[0]

    @property
    def steps(self) -> list[dict[str, float]]:
        """The log's entries of optimizer steps, without the summary at its end."""
        return [entry for entry in self.saved["log"] if "loss" in entry]

    @property
    def validations(self) -> list[dict[str, float]]:
        """The log's entries of held-out data."""
        return [entry for entry in self.saved["log"] if "eval_loss" in entry]

    @property
    def best_step(self) -> int | None:
        """The step whose weights did best on held-out data, where the run noted it."""
        return self.saved.get("best_step")

    def scores_on(self, fingerprint: str) -> Evaluation | None:
        """Find the scores on the questions with this fingerprint."""
        return next((one for one in self.evaluations if one.asked.fingerprint == fingerprint), None)


def read_run(folder: str | Path) -> Run:
    """Read what a run's folder holds.

    Raises:
        CachekdError: the folder is not a run, or what it holds cannot be read.
    """
    folder = Path(folder)
    path = folder / RUN_FILE
    if not path.exists():
        raise CachekdError(
            "this is not a run", where=str(folder), expected=RUN_FILE, fix="run `cachekd train`"
        )
    return Run(
        folder, folder.resolve().name, _read_run_file(path), read_scores(folder), read_benchmarks(folder)
    )


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        saved: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CachekdError("what the run saved cannot be read", where=str(path), found=str(error)) from None
    if not isinstance(saved, dict) or not saved.keys() >= _NEEDED:
        raise CachekdError(
            "this is not what a run saves",
            where=str(path),
            expected=f"an object with {', '.join(sorted(_NEEDED))}",
            found=", ".join(list(saved)[:5]) if isinstance(saved, dict) else type(saved).__name__,
        )
    return saved


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Give each run a colour, and as much of its path as no two of them share.

    Raises:
        CachekdError: a run is among them twice, or there are more than there are colours.
    """
    if len(runs) > len(RUN_COLORS):
        raise CachekdError(
            f"a report compares {len(RUN_COLORS)} runs at most",
            found=f"{len(runs)}",
            fix="name fewer baselines",
        )
    paths = [run.folder.resolve() for run in runs]
    twice = [str(path) for path in paths if paths.count(path) > 1]
    if twice:
        raise CachekdError("a run is compared with itself", where=twice[0], fix="name another baseline")
    return [
        replace(run, name=name, color=color)
        for run, name, color in zip(runs, shortest(paths), RUN_COLORS, strict=False)
    ]


def term_shares(run: Run) -> dict[str, Any]:
    """Each term's weighted value at the first and the last log entry that has them all, and its share there.

    A term that is orders of magnitude below the others does nothing; this is where it shows.
    """
    config = run.saved["config"]
    names = [name for name in TERMS if any(name in entry for entry in run.steps)]
    weights = {name: config.get(f"lambda_{name}", 1.0) for name in names}  # that of L_CE is no setting

    def weighted(name: str, entry: dict[str, float]) -> float:
        return float(entry.get(f"lambda_{name}", weights[name])) * entry[name]  # a schedule's is in the log

    # Where the switched path runs in some steps only, others lack L_VSD.
    whole = [entry for entry in run.steps if all(name in entry for name in names)]
    ends = [whole[0], whole[-1]] if whole else []
    totals = [sum(weighted(name, entry) for name in names) for entry in ends]
    terms = []
    for name in names:
        values = [weighted(name, entry) for entry in ends]
        shares = [value / total if total else 0.0 for value, total in zip(values, totals, strict=True)]
        ends_of_term = list(zip(values, shares, strict=True))
        weight = str(Schedule(**weights[name])) if isinstance(weights[name], dict) else weights[name]
        terms.append({"label": TERMS[name].label, "weight": weight, "ends": ends_of_term})
    return {"steps": [int(entry["step"]) for entry in ends], "terms": terms}


# ---- settings

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
    across = (saved.get("across_tokenizers") or {}).get("aligned")  # of two tokenizers
    if across:
        found["aligned answer tokens"] = f"{across['share']:.1%}"
        found["samples of which nothing was aligned"] = across["differing"]["samples"] or None
    found["best step on held-out data"] = run.best_step
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
