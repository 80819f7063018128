"""`cachekd train`: train a student against a cache."""

from __future__ import annotations

import os
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cachekd.config import TrainConfig
from cachekd.paths import is_address
from cachekd_cli.console import (
    byte_progress,
    console,
    duration,
    errors,
    print_json,
    print_left_out,
    progress_bar,
    quiet_hub,
    quiet_libraries,
    say,
    table,
)
from cachekd_cli.options import AsJson, takes
from cachekd_cli.signals import exit_code, interrupt, noting_the_first

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

    A run that was cut short goes on when its command is repeated. Ctrl-C and SIGTERM let the step that runs
    end and write a checkpoint; a second one stops at once. Several GPUs: accelerate launch
    -m cachekd_cli.main train ... With `training: {load_best_model_at_end: true}` in the YAML a run ends with
    the student of the best evaluation.
    """
    quiet_libraries()
    try:
        train_or_estimate(config, estimate=estimate, as_json=as_json)
    except KeyboardInterrupt as stop:
        print_stopped(stop, config.out)
        raise typer.Exit(exit_code(stop)) from None


def train_or_estimate(config: TrainConfig, *, estimate: bool, as_json: bool) -> None:
    """Fetch what is not here yet, run, and print the result; one process prints."""
    fetch_cache(config)
    if estimate:
        from cachekd.train.estimate import estimate_training

        result = estimate_training(config)
        if is_main_process():
            print_json(asdict(result)) if as_json else print_estimate(result)
        return
    if is_main_process() and not as_json:
        print_settings(config)
    summary = run_train(config)
    if not is_main_process():
        return
    print_json(asdict(summary)) if as_json else print_summary(summary)


def fetch_cache(config: TrainConfig) -> None:
    """Fetch published caches, each behind a bar of its own; training then finds them."""
    from cachekd.hub import local_folder

    if not config.distils or config.live_teacher:
        return
    for cache in (config.cache, config.eval_cache):
        if cache is None or not is_address(cache):
            continue
        quiet_hub()
        bar = progress_bar("MB")
        bar.disable = not is_main_process()
        with bar:
            advance, set_total = byte_progress(bar, "fetch")
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
        self.loading = errors.status(f"{description}: starting")
        self.bar = progress_bar("steps")
        self.bar.disable = self.hidden
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
        self.loading.update(f"{self.description}: {escape(phase)}")

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
                    text = f"step {state.global_step:,}: {evaluation_line(metrics)}"
                    bar.console.print(text, markup=False, highlight=False)

        return ShowProgress()


def evaluation_line(metrics: dict[str, float]) -> str:
    """Write an evaluation in one line, without the time that it took."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "eval_runtime")


def print_settings(config: TrainConfig) -> None:
    """Print what is about to run, presets resolved; settings at their defaults are left out."""
    from cachekd.losses.terms import TERMS

    weights = {name: "" if name == "ce" else f"{weight:g} " for name, weight in config.weights.items()}
    terms = [f"{weights[name]}{TERMS[name].label}" for name in config.terms]
    bridge = [("switch_bridge", f"{config.switch_bridge}, beyond the paper")] if config.switch_bridge else []
    shown = {"switch_bridge", "stage", "trainable", *(f"lambda_{name}" for name in weights)}
    said = config.model_dump()
    rows = [
        *([("stage", config.stage)] if config.stage else []),
        ("trainable", ", ".join(config.trainable)),
        ("loss", " + ".join(terms)),
        *bridge,
        *(
            (name, said[name])
            for name, field in type(config).model_fields.items()
            if name not in shown and getattr(config, name) != field.default
        ),
    ]
    console.print(table("settings (the others are at their defaults)", ("", "value"), rows))


def print_stopped(stop: KeyboardInterrupt, out: Path) -> None:
    """Say after which step the run stopped, and how to go on."""
    from cachekd.train.folder import how_to_go_on

    if is_main_process():
        say(f"{str(stop) or 'stopped'}: {how_to_go_on(out)}", errors)


def print_summary(summary: TrainSummary) -> None:
    """Print how the run went, and what was left out."""
    rows = [
        ("steps", f"{summary.steps:,}"),
        *([("resumed from step", f"{summary.resumed_from:,}")] if summary.resumed_from else []),
        *([("samples by L_CE alone", f"{summary.uncovered:,}")] if summary.uncovered else []),
        ("wall time", f"{summary.seconds:.1f} s"),
        ("waited for data", f"{summary.data_wait:.1%}"),
        *((f"last {name}", f"{value:.4f}") for name, value in summary.terms.items()),
        *([("best step, whose student this is", f"{summary.best_step:,}")] if summary.best_step else []),
        *((name, f"{value:.4f}") for name, value in summary.evaluation.items() if name != "eval_runtime"),
    ]
    console.print(table(f"student {summary.out}", ("", "value"), rows))
    print_left_out("samples that the cache lacks", summary.missing)
    print_left_out("samples that cannot be used", summary.bad)
    print_left_out("held-out samples that their cache lacks", summary.eval_missing)
    print_left_out("held-out samples that cannot be used", summary.eval_bad)
    say(f"next: cachekd eval {summary.out} --data <held-out data> --teacher <teacher>")


def print_estimate(estimate: TrainEstimate) -> None:
    """Print settings, parameters, memory by part, disk and time, before anything long starts."""
    from cachekd.train.size import told

    settings, (samples, tokens) = estimate.settings, estimate.longest_batch
    a_step = [settings[name] for name in ("batch_size", "gradient_accumulation", "processes")]
    seconds = estimate.seconds_per_step
    rows = [
        ("samples a step", f"{' x '.join(map(str, a_step))} = {prod(a_step):,}"),
        ("dtype", settings["dtype"]),
        ("gradient checkpointing", "on" if settings["gradient_checkpointing"] else "off"),
        ("trainable", ", ".join(settings["trainable"]) + (" (adapters)" if settings["lora"] else "")),
        ("optimizer", settings["optim"]),
        ("student parameters", f"{estimate.student_parameters:,}"),
        ("of them trained", f"{estimate.trained_parameters:,}"),
        ("teacher parameters", f"{estimate.teacher_parameters:,}"),
        *([("switch bridge's", f"{estimate.bridge_parameters:,}")] if estimate.bridge_parameters else []),
        *((f"memory: {name}", f"{size / 1e6:,.1f} MB") for name, size in estimate.memory.items()),
        ("of these, an array of logits", f"{estimate.logits_bytes / 1e6:,.1f} MB, counted"),
        ("peak memory", f"{estimate.peak_bytes / 1e6:,.1f} MB"),
        (f"in {estimate.measured_steps} random steps", f"{estimate.random_peak_bytes / 1e6:,.1f} MB"),
        (
            f"in the {samples} longest samples, up to {tokens:,} tokens",
            f"{estimate.longest_peak_bytes / 1e6:,.1f} MB",
        ),
        ("disk, at most", f"{estimate.disk_bytes / 1e6:,.1f} MB: {told(estimate.disk)}"),
        ("time per step", f"{seconds:.2f} s"),
        ("steps", f"{estimate.steps:,}"),
        *(
            [("evaluations", f"{estimate.evaluations:,} of {duration(estimate.seconds_per_evaluation)}")]
            if estimate.evaluations
            else []
        ),
        (
            "time of the run",
            duration(seconds * estimate.steps + estimate.evaluations * estimate.seconds_per_evaluation),
        ),
    ]
    console.print(table(f"estimate from {estimate.measured_steps} steps", ("", "value"), rows))
