"""`cachekd train`: stage two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachekd_cli.console import console, progress_bar, quiet_libraries, table

if TYPE_CHECKING:
    from cachekd.config import TrainConfig
    from cachekd.train import TrainSummary


def train_command(
    config: Annotated[
        Path | None, typer.Option(help="YAML with any of these settings; options override it.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Student: a model folder or hub name.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher, for the switched path.")] = None,
    cache: Annotated[Path | None, typer.Option(help="What `cachekd dump` wrote.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data set that was dumped, or a part of it.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; must be new or empty.")] = None,
    lambda_align: Annotated[float | None, typer.Option(help="Weight of L_Align. [default: 1]")] = None,
    lambda_vsd: Annotated[float | None, typer.Option(help="Weight of L_VSD. [default: 1]")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of DBiLD. [default: 3]")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. [default: 1]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step. [default: 16]")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Batches per step. [default: 1]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's peak. [default: 2e-5]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's. [default: 0]")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps. [default: 0.03]")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Gradient clip. [default: 1]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the data order. [default: 0]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16, float16. [default: auto]")
    ] = None,
    logging_steps: Annotated[
        int | None, typer.Option(help="Steps between log entries. [default: 10]")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read samples. [default: 0]")] = None,
) -> None:
    """Train a student against a cache: L_CE + lambda_align L_Align + lambda_vsd L_VSD.

    Example: cachekd train --student models/llava-0.5b --teacher models/llava-7b
    --cache caches/llava-7b --data data/train --out runs/switch-kd

    Plain cross-entropy, as a baseline: --lambda-align 0 --lambda-vsd 0 (needs neither teacher nor cache)
    """
    options = {name: value for name, value in locals().items() if name != "config"}
    from cachekd.config import TrainConfig, read_config

    quiet_libraries()
    print_summary(run_train(read_config(config, TrainConfig, options)))


def run_train(config: TrainConfig, description: str = "train") -> TrainSummary:
    """Train behind a progress bar that shows the terms."""
    from transformers import TrainerCallback

    from cachekd.train import train

    with progress_bar("steps") as bar:
        task = bar.add_task(description, total=None, note="")

        class ShowProgress(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
                bar.update(task, total=state.max_steps)

            def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
                bar.update(task, completed=state.global_step)

            def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
                terms = {name: logs[name] for name in ("ce", "align", "vsd") if name in (logs or {})}
                if terms:
                    bar.update(task, note="  ".join(f"{name} {value:.3f}" for name, value in terms.items()))

        return train(config, [ShowProgress()])


def print_summary(summary: TrainSummary) -> None:
    """The summary table."""
    rows = [
        ("steps", f"{summary.steps:,}"),
        ("wall time", f"{summary.seconds:.1f} s"),
        *((f"last {name}", f"{value:.4f}") for name, value in summary.terms.items()),
    ]
    console.print(table(f"student {summary.out}", ("", "value"), rows))
    console.print(
        f"next: cachekd eval {summary.out} --data <held-out data> --teacher <teacher>", highlight=False
    )
