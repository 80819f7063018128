"""`cachekd train`: train a student against a cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cachekd.config import TrainConfig
from cachekd.config.weights import Schedule
from cachekd.errors import megabytes
from cachekd.paths import is_address
from cachekd_cli.console import (
    counting_bytes,
    duration,
    errors,
    if_any,
    print_left_out,
    print_result,
    print_values,
    progress_bar,
    quiet_hub,
    quiet_libraries,
    say,
)
from cachekd_cli.options import AsJson, takes
from cachekd_cli.signals import interrupt, noting_the_first, stopping_in_order

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from cachekd.train import TrainSummary
    from cachekd.train.estimate import TrainEstimate


@takes(TrainConfig)
def train_command(
    config: TrainConfig,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Run a few steps, print memory and time, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a student against a cache: L_CE + lambda_align L_Align + lambda_vsd L_VSD.

    Example: cachekd train --student models/llava-0.5b --teacher models/llava-7b
    --cache caches/llava-7b --data data/train --out runs/switch-kd

    In stages: --stage dpt trains the projector (L_CE and L_Align), --stage sft projector and language model
    (L_CE alone), --stage dft everything with all three terms.

    Plain cross-entropy, as a baseline: --lambda-align 0 --lambda-vsd 0 (needs neither teacher nor cache)

    To resume a run that was cut short, repeat its command. Ctrl-C and SIGTERM let the current step end and
    write a checkpoint; a second one stops at once. Several GPUs: accelerate launch
    -m cachekd train ... With `training: {load_best_model_at_end: true}` in the YAML a run ends with
    the student of the best evaluation.
    """
    quiet_libraries()
    with stopping_in_order(lambda stop: how_to_go_on(stop, config.out)):
        train_or_estimate(config, estimate=estimate, as_json=as_json)


def train_or_estimate(config: TrainConfig, *, estimate: bool, as_json: bool) -> None:
    """Fetch what is not here yet, run, and print the result; one process prints."""
    fetch_cache(config)
    result: Any
    if estimate:
        from cachekd.train.estimate import estimate_training

        result = estimate_training(config)
    else:
        if is_main_process() and not as_json:
            print_settings(config)
        result = run_train(config)
    if is_main_process():
        print_result(as_json, result, print_estimate if estimate else print_summary)


def fetch_cache(config: TrainConfig) -> None:
    """Fetch published caches, each behind a bar of its own; training then finds them."""
    from cachekd.hub import local_folder

    if not config.distils or config.live_teacher:
        return
    for cache in (config.cache, config.eval_cache):
        if cache is not None and is_address(cache):
            quiet_hub()
            with counting_bytes("fetch", hidden=not is_main_process()) as (advance, set_total):
                local_folder(cache, progress=advance, total=set_total)


def is_main_process() -> bool:
    """Whether this is the process that prints; `accelerate launch` and torchrun number them."""
    return os.environ.get("RANK", "0") == "0"


def run_train(config: TrainConfig, description: str = "train") -> TrainSummary:
    """Train behind a progress bar that shows the terms; before the first step, what is being loaded.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came. Its text says after which step, if there is a checkpoint of
            that step.
    """
    from cachekd.train import train
    from cachekd.train.callbacks import RunStopped

    with TrainBar(description) as bar, noting_the_first(bar.under_way, bar.show_stopping) as noted:
        try:
            return train(config, [bar.callback()], asked_to_stop=noted, phase=bar.show_phase)
        except RunStopped as stop:
            raise interrupt(stop.reason, str(stop)) from None


class TrainBar:
    """A line that says what is loaded, then a bar of steps; of several processes the first shows them."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.hidden = not is_main_process()
        self.loading = errors.status(escape(f"{description}: starting"))
        self.bar = progress_bar("steps", hidden=self.hidden)
        self.task = self.bar.add_task(description, total=None, note="")

    def __enter__(self) -> TrainBar:
        if not self.hidden:
            self.loading.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.loading.stop()
        self.bar.stop()

    def show_phase(self, phase: str) -> None:
        """Show what is done before the first step."""
        self.loading.update(escape(f"{self.description}: {phase}"))

    def under_way(self) -> bool:
        """Whether the steps have begun."""
        return self.bar.tasks[self.task].total is not None

    def show_stopping(self) -> None:
        """Show that a signal came. Nothing is printed: this runs in the middle of something else."""
        self.bar.update(self.task, description=f"{self.description}: stopping after this step")

    def callback(self) -> TrainerCallback:
        """The Trainer's callback that moves the bar."""
        from transformers import TrainerCallback

        from cachekd.losses.terms import TERMS

        bar, task, loading, hidden = self.bar, self.task, self.loading, self.hidden

        class ShowProgress(TrainerCallback):
            terms = ""  # as they were logged last

            def on_train_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
                loading.stop()
                bar.start()
                bar.update(task, total=state.max_steps)

            def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
                bar.update(task, completed=state.global_step)

            def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
                terms = {name: logs[name] for name in TERMS if name in (logs or {})}
                if terms:
                    self.terms = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
                    bar.update(task, note=self.terms)

            def on_prediction_step(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
                bar.update(task, note="evaluating")

            def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:  # type: ignore[no-untyped-def]
                bar.update(task, note=self.terms)
                if not hidden:
                    found = "  ".join(f"{name} {value:.4f}" for name, value in evaluation_of(metrics))
                    text = f"step {state.global_step:,}: {found}"
                    bar.console.print(text, markup=False, highlight=False)

        return ShowProgress()


def evaluation_of(metrics: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Yield what an evaluation found, without the time that it took."""
    return ((name, value) for name, value in metrics.items() if name != "eval_runtime")


def print_settings(config: TrainConfig) -> None:
    """Print what is about to run, presets resolved; settings at their defaults are left out."""
    from cachekd.losses.terms import TERMS

    weights = {
        name: "" if name == "ce" else f"({weight}) " if isinstance(weight, Schedule) else f"{weight:g} "
        for name, weight in config.weights.items()
    }
    shown = {"switch_bridge", "stage", "trainable", *TERMS, *(f"lambda_{name}" for name in weights)}
    said = config.model_dump()
    values = {
        "stage": config.stage,
        "trainable": ", ".join(config.trainable),
        "loss": " + ".join(f"{weights[name]}{TERMS[name].label}" for name in config.terms),
        **{f"loss of {TERMS[name].label}": str(loss) for name, loss in config.losses.items()},
        "switch_bridge": config.switch_bridge and f"{config.switch_bridge}, beyond the paper",
    }
    values |= {
        name: str(said[name])
        for name, field in type(config).model_fields.items()
        if name not in shown and getattr(config, name) != field.default
    }
    print_values("settings (the others are at their defaults)", values)


def how_to_go_on(stop: KeyboardInterrupt, out: Path) -> str:
    """Say after which step the run stopped, and how to go on; nothing where another process says it."""
    from cachekd.train.folder import how_to_go_on

    return f"{str(stop) or 'stopped'}: {how_to_go_on(out)}" if is_main_process() else ""


def print_summary(summary: TrainSummary) -> None:
    """Print how the run went, and what was left out."""
    aligned = summary.aligned
    values = {
        "steps": f"{summary.steps:,}",
        "resumed from step": if_any(summary.resumed_from),
        "samples by L_CE alone": if_any(summary.uncovered),
        "aligned answer tokens": aligned and f"{aligned.share:.1%} of {aligned.tokens:,}",
        "wall time": f"{summary.seconds:.1f} s",
        "floating point operations": if_any(summary.cost.flops and summary.cost.flops / 1e12, "{:,.4g} T"),
        "peak memory": None if summary.cost.peak_bytes is None else megabytes(summary.cost.peak_bytes),
        "waited for data": f"{summary.data_wait:.1%}",
        **{f"last {name}": f"{value:.4f}" for name, value in summary.terms.items()},
        **{
            f"last gradient of {term} at {part}": f"{size:.4g}"
            for term, of in summary.gradients.items()
            for part, size in of.items()
        },
        "best step, whose student this is": if_any(summary.best_step),
        **{name: f"{value:.4f}" for name, value in evaluation_of(summary.evaluation)},
    }
    print_values(f"student {summary.out}", values)
    print_left_out("samples that the cache lacks", summary.missing)
    print_left_out("samples that cannot be used", summary.bad)
    if aligned is not None:
        print_left_out("samples, whose answers differ in bytes", aligned.differing, "not aligned")
    print_left_out("held-out samples that their cache lacks", summary.eval_missing)
    print_left_out("held-out samples that cannot be used", summary.eval_bad)
    print_left_out("held-out samples, whose answers differ in bytes", summary.eval_differing, "not aligned")
    say(f"next: cachekd eval {summary.out} --data <held-out data> --teacher <teacher>")


def print_estimate(estimate: TrainEstimate) -> None:
    """Print settings, parameters, memory by part, disk and time, before anything long starts."""
    from cachekd.train.size import told

    settings, (samples, tokens) = estimate.settings, estimate.longest_batch
    counted, what = ("batch_size", "samples")
    if settings["batch_tokens"] is not None:
        counted, what = ("batch_tokens", "padded tokens")
    a_step = [settings[name] for name in (counted, "gradient_accumulation", "processes")]
    evaluating = estimate.evaluations * estimate.seconds_per_evaluation
    values = {
        f"{what} a step": f"{' x '.join(map(str, a_step))} = {prod(a_step):,}",
        "dtype": settings["dtype"],
        "gradient checkpointing": "on" if settings["gradient_checkpointing"] else "off",
        "trainable": ", ".join(settings["trainable"]) + (" (adapters)" if settings["lora"] else ""),
        "optimizer": settings["optim"],
        "student parameters": f"{estimate.student_parameters:,}",
        "of them trained": f"{estimate.trained_parameters:,}",
        "teacher parameters": f"{estimate.teacher_parameters:,}",
        "switch bridge's": if_any(estimate.bridge_parameters),
        **{f"memory: {name}": megabytes(size) for name, size in estimate.memory.items()},
        "of these, an array of logits": f"{megabytes(estimate.logits_bytes)}, counted",
        "peak memory": megabytes(estimate.peak_bytes),
        f"in {estimate.measured_steps} random steps": megabytes(estimate.random_peak_bytes),
        f"in the {samples} longest samples, up to {tokens:,} tokens": megabytes(estimate.longest_peak_bytes),
        "disk, at most": f"{megabytes(estimate.disk_bytes)}: {told(estimate.disk)}",
        "time per step": f"{estimate.seconds_per_step:.2f} s",
        "steps": f"{estimate.steps:,}",
        "evaluations": if_any(estimate.evaluations, f"{{:,}} of {duration(estimate.seconds_per_evaluation)}"),
        "time of the run": duration(estimate.seconds_per_step * estimate.steps + evaluating),
    }
    print_values(f"estimate from {estimate.measured_steps} steps", values)
