"""One self-contained HTML page about a run: is the student good, how did it get there, on what cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter

from cachekd.cache import Manifest
from cachekd.cache.files import require_place, write_file
from cachekd.describe import bytes_per_token
from cachekd.errors import CachekdError
from cachekd.files import EVAL_FILE, REPORT_FILE, RUN_FILE
from cachekd.plots import COLORS, STYLE, k_plot, page_environment, svg

TERMS = {"ce": "L_CE", "align": "L_Align", "vsd": "L_VSD"}


@dataclass(frozen=True)
class Run:
    """A run: its folder's name, cachekd_run.json, and cachekd_eval.json if it was evaluated."""

    name: str
    record: dict[str, Any]
    evaluation: dict[str, Any] | None

    @property
    def score(self) -> dict[str, Any] | None:
        return self.evaluation["models"][0] if self.evaluation else None

    @property
    def steps(self) -> list[dict[str, float]]:
        """The log's entries of optimizer steps, without the summary at its end."""
        return [entry for entry in self.record["log"] if "loss" in entry]


def read_run(folder: str | Path) -> Run:
    """Read what `cachekd train` and `cachekd eval` left in a run's folder.

    Raises:
        CachekdError: the folder is not a run, or a record in it is not one.
    """
    folder = Path(folder)
    path = folder / RUN_FILE
    if not path.exists():
        raise CachekdError(
            "this is not a run", where=str(folder), expected=RUN_FILE, fix="run `cachekd train`"
        )
    evaluated = folder / EVAL_FILE
    evaluation = _read_record(evaluated, "models") if evaluated.exists() else None
    return Run(folder.name, _read_record(path, "log", "config", "cache"), evaluation)


def _read_record(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object with these names in it."""
    try:
        record: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CachekdError("the run's record cannot be read", where=str(path), found=str(error)) from None
    if not isinstance(record, dict) or not set(needed) <= record.keys():
        raise CachekdError(
            "this is not a run's record",
            where=str(path),
            expected=f"an object with {', '.join(needed)}",
            found=", ".join(list(record)[:5]) if isinstance(record, dict) else type(record).__name__,
        )
    return record


def write_report(
    folder: str | Path, baselines: Sequence[str | Path] = (), out: str | Path | None = None
) -> Path:
    """Write the page, by default into the run's folder; returns where it is.

    Raises:
        CachekdError: one of the folders is not a run, or the page cannot be written.
    """
    out = Path(folder) / REPORT_FILE if out is None else Path(out)
    run, others = read_run(folder), [read_run(baseline) for baseline in baselines]
    require_place(out)
    write_file(out, build_report(run, others).encode())
    return out


def build_report(run: Run, baselines: list[Run]) -> str:
    """The page's HTML."""
    environment = page_environment()
    environment.globals["zip"] = zip
    with matplotlib.rc_context(STYLE):
        plots = {
            "accuracy": accuracy_plot(run, baselines),
            "terms": terms_plot(run, baselines),
            "optimizer": optimizer_plot(run),
            "k": k_plot(run.record["k_histogram"]) if run.record["k_histogram"] else None,
        }
    return environment.get_template("report.html.jinja").render(
        run=run,
        verdict=verdict(run, baselines),
        plots=plots,
        scores=_scores(run, baselines),
        types=_types(run, baselines),
        shares=_shares(run),
        cache=_cache_rows(run),
        config=run.record["config"],
        versions=run.record["versions"],
    )


def verdict(run: Run, baselines: list[Run]) -> str:
    """One sentence from the numbers, whichever way they go."""
    if run.score is None or run.evaluation is None:
        return f"{run.name} has not been evaluated: run `cachekd eval` on it."
    exact = run.score["exact_match"]
    words = [f"{run.name} answers {100 * exact:.1f} % of the questions exactly"]
    for other in baselines:
        if other.score:
            words.append(f"{100 * (exact - other.score['exact_match']):+.1f} points against {other.name}")
    if run.evaluation["teacher"]:
        teacher = run.evaluation["teacher"]["exact_match"]
        words.append(f"{100 * (exact - teacher):+.1f} points against its teacher's {100 * teacher:.1f} %")
    return ", ".join(words) + "."


def accuracy_plot(run: Run, baselines: list[Run]) -> str | None:
    """Bars: teacher, this run, baselines."""
    rows = [row for row in _scores(run, baselines) if row["exact_match"] is not None]
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(6.4, 0.5 + 0.42 * len(rows)))
    values = [100 * row["exact_match"] for row in rows]
    bars = axes.barh([row["name"] for row in rows], values, color=[COLORS[row["kind"]] for row in rows])
    axes.bar_label(bars, fmt="%.1f %%", padding=3, color="#6b7280")
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="exact match, %")
    return svg(figure)


def terms_plot(run: Run, baselines: list[Run]) -> str:
    """Each term over the steps, with the baselines' in grey."""
    names = [name for name in TERMS if any(name in entry for entry in run.steps)]
    figure, grid = pyplot.subplots(1, len(names), figsize=(3.1 * len(names), 2.5), squeeze=False)
    for axes, name in zip(grid[0], names, strict=True):
        for one, color in [*((other, COLORS["other"]) for other in baselines), (run, COLORS["run"])]:
            points = [(entry["step"], entry[name]) for entry in one.steps if name in entry]
            axes.plot(*zip(*points, strict=True), color=color, label=one.name) if points else None
        axes.set(title=TERMS[name], xlabel="step", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if baselines:
        figure.legend(
            *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
        )
    return svg(figure)


def optimizer_plot(run: Run) -> str:
    """Gradient norm and learning rate over the steps."""
    figure, grid = pyplot.subplots(1, 2, figsize=(6.2, 1.9))
    for axes, name in zip(grid, ("grad_norm", "learning_rate"), strict=True):
        points = [(entry["step"], entry[name]) for entry in run.steps if name in entry]
        axes.plot(*zip(*points, strict=True), color=COLORS["run"]) if points else None
        axes.set(title=name.replace("_", " "), xlabel="step")
    return svg(figure)


def _scores(run: Run, baselines: list[Run]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"name": one.name, "kind": kind, "score": one.score} for one, kind in _with_kinds(run, baselines)
    ]
    if run.evaluation and run.evaluation["teacher"]:
        rows.insert(0, {"name": "teacher", "kind": "teacher", "score": run.evaluation["teacher"]})
    return [
        {**row, **{key: (row["score"] or {}).get(key) for key in ("exact_match", "top1_agreement", "kl")}}
        for row in rows
    ]


def _with_kinds(run: Run, baselines: list[Run]) -> list[tuple[Run, str]]:
    return [(run, "run"), *((other, "other") for other in baselines)]


def _types(run: Run, baselines: list[Run]) -> list[dict[str, Any]]:
    if run.evaluation is None:
        return []
    scored = [row for row in _scores(run, baselines) if row["score"]]
    return [
        {"type": kind, "count": count, "shares": [row["score"]["by_type"].get(kind) for row in scored]}
        for kind, count in sorted(run.evaluation["types"].items(), key=lambda item: -item[1])
    ]


def _shares(run: Run) -> list[dict[str, Any]]:
    """Each term's weighted value at the first and the last log entry, and its share of the loss there.

    A term that is orders of magnitude below the others does nothing; this is where it shows.
    """
    weights = {
        "ce": 1.0,
        "align": run.record["config"]["lambda_align"],
        "vsd": run.record["config"]["lambda_vsd"],
    }
    rows = []
    for name, label in TERMS.items():
        ends = [entry for entry in (run.steps[:1] + run.steps[-1:]) if name in entry]
        if ends:
            values = [weights[name] * entry[name] for entry in ends]
            totals = [sum(weights[term] * entry[term] for term in TERMS if term in entry) for entry in ends]
            shares = [value / total if total else 0.0 for value, total in zip(values, totals, strict=True)]
            rows.append({"term": label, "weight": weights[name], "values": values, "shares": shares})
    return rows


def _cache_rows(run: Run) -> dict[str, str]:
    if run.record["cache"] is None:
        return {}
    manifest = Manifest.model_validate(run.record["cache"])
    prints = manifest.fingerprints
    return {
        "teacher": f"{manifest.teacher.name} ({manifest.teacher.model_type}, {manifest.teacher.dtype})",
        "samples": f"{manifest.samples:,}",
        "answer tokens": f"{manifest.tokens:,}",
        "bytes per token": bytes_per_token(manifest.size, manifest.sketch_bytes, manifest.tokens),
        "mean k": f"{manifest.entries / manifest.tokens:.1f}",
        "size": f"{manifest.size / 1e6:.2f} MB in {len(manifest.shards)} shard(s)",
        "codec": ", ".join(f"{name} {value}" for name, value in manifest.codec.model_dump().items()),
        **_sketch_rows(manifest),
        "tokenizer": prints.tokenizer[:16],
        "chat template": prints.chat_template[:16],
        "image processor": prints.image_processor[:16],
        **({} if prints.encoding is None else {"encoding": prints.encoding[:16]}),
        "weights": manifest.teacher.weights_sha256[:16],
    }


def _sketch_rows(manifest: Manifest) -> dict[str, str]:
    fidelity = manifest.fidelity
    rows = {}
    for number, sketch in enumerate(manifest.sketches, 1):
        name = "tail sketch" if number == 1 else f"tail sketch {number}"
        rows[name] = f"{sketch.axes} axes, step {sketch.step:.4g} nats, {sketch.bytes / 1e6:.2f} MB"
    if fidelity is not None:
        rows["against the live teacher"] = (
            f"KL {fidelity.kl:.4g} nats, gradient cosine {fidelity.cosine:.4f}, "
            f"largest error of a kept logprob {fidelity.max_error:.3f} ({fidelity.tokens} tokens)"
        )
    return rows
