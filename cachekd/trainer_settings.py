"""The `training` mapping: which of the Trainer's fields may be set there, and to what."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from cachekd.errors import CachekdError

FIELDS = {field.name for field in fields(TrainingArguments) if field.init}
# Plain ones, which pydantic checks, and reads as YAML's 1e-8 without a point is meant (a text, to YAML).
_PLAIN = {bool, int, float, bool | None, int | None, float | None}
_TYPES = {name: hint for name, hint in get_type_hints(TrainingArguments).items() if hint in _PLAIN}

# The Trainer's name -> ours. One setting has one name.
OWN_NAMES = {
    "output_dir": "out",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
    "eval_steps": "eval_steps",
    "dataloader_num_workers": "workers",
    "bf16": "dtype",
    "fp16": "dtype",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
}
_NO_LOGITS = "an evaluation on eval_data adds terms up; it keeps no logits"
_AS_IT_TRAINS = "the student is evaluated in the dtype that it trains in"
# What would be ignored, or break the loss, in silence.
REFUSED = {
    "remove_unused_columns": "the model's inputs are chosen by the processor",
    "label_names": "answers are found by the chat template",
    "label_smoothing_factor": "the loss is L_CE + lambda_align L_Align + lambda_vsd L_VSD",
    "resume_from_checkpoint": "the same command goes on from the last checkpoint by itself",
    "save_only_model": "a checkpoint without its optimizer cannot be gone on from",
    "do_train": "this is `cachekd train`",
    "do_eval": "set `eval_data` at the top level: it is evaluated while the student trains",
    "do_predict": "`cachekd eval` scores a run",
    "eval_delay": "evaluations begin after the first `eval_steps` steps; set these, at the top level",
    "eval_accumulation_steps": _NO_LOGITS,
    "eval_do_concat_batches": _NO_LOGITS,
    "eval_use_gather_object": _NO_LOGITS,
    "batch_eval_metrics": _NO_LOGITS,
    "prediction_loss_only": _NO_LOGITS,
    "include_for_metrics": _NO_LOGITS,
    "bf16_full_eval": _AS_IT_TRAINS,
    "fp16_full_eval": _AS_IT_TRAINS,
    "length_column_name": "lengths are counted from the text",
    "use_liger_kernel": "the head and its losses run in chunks already",
}
_OF_WORKERS = (
    "dataloader_multiprocessing_context",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
)
# Names of earlier versions of the Trainer, and what to set now.
RENAMED = {
    "group_by_length": "training: {train_sampling_strategy: group_by_length}",
    "logging_dir": "TENSORBOARD_LOGGING_DIR in the environment",
}


def checked_settings(training: dict[str, Any], *, workers: int) -> dict[str, Any]:
    """The same settings, numbers as numbers.

    Args:
        workers: processes that read samples, of which some settings are.

    Raises:
        CachekdError: an unknown name, one that has a name of ours, or a value of another type or without use
            here; the setting is named.
    """
    for name in training:
        _check_name(name)
    _check_choices(training)
    for name in _OF_WORKERS:
        if training.get(name) and not workers:
            raise CachekdError(
                "it is of the processes that read samples, and there are none",
                where=_where(name),
                expected="workers above 0 (the default is 0 on a CPU)",
                found=f"{training[name]}, workers 0",
                fix="--workers 1, or leave it out",
            )
    return {name: _typed(name, value) for name, value in training.items()}


def check_packages(arguments: TrainingArguments) -> None:
    """Refuse an optimizer, a reporter or a debugger that would fail once the models are loaded.

    Raises:
        CachekdError: there is none of that name, or its package is not installed.
    """
    if DebugOption.UNDERFLOW_OVERFLOW in arguments.debug:
        raise CachekdError(
            "the Trainer's debugger looks at logits, which are put off here",
            where=_where("debug"),
            found="underflow_overflow",
            fix="leave it out: a loss or gradient that is not finite stops the run, and is saved",
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise CachekdError(
            "this optimizer's package is not installed",
            where=_where("optim"),
            found=f"{arguments.optim.value}: {_first_line(error)}",
            fix=_install(arguments.optim.value),
        ) from None
    except (ValueError, TypeError, NotImplementedError):
        pass  # those that need the model are asked again with it: `explained`
    for name in arguments.report_to:
        _check_reporter(name)


@contextmanager
def explained(training: dict[str, Any]) -> Iterator[None]:
    """Building the Trainer, with what it refuses late said as its settings' fault, if there are any.

    Raises:
        CachekdError: what the Trainer said, and which settings it may mean.
    """
    try:
        yield
    except (ImportError, TypeError, ValueError, AttributeError, NotImplementedError, OSError) as error:
        if not training:
            raise
        raise CachekdError(
            "the Trainer cannot be built with these settings",
            where=meant_by(error, training),
            found=f"{type(error).__name__}: {error}",
        ) from error


def meant_by(error: Exception, training: dict[str, Any]) -> str:
    """The settings whose name the Trainer's words have in them, or whose value where it is a text; all of
    them if there is none."""

    def named(name: str, value: Any) -> bool:
        return name in str(error) or (isinstance(value, str) and value in str(error))

    meant = [name for name, value in training.items() if named(name, value)]
    return ", ".join(_where(name) for name in meant or training)


def _where(name: str) -> str:
    return f"setting 'training.{name}'"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _check_name(name: str) -> None:
    where = _where(name)
    if name in OWN_NAMES:
        raise CachekdError(
            f"{name!r} has a setting of its own",
            where=where,
            fix=f"set `{OWN_NAMES[name]}` at the top level, outside `training`",
        )
    if name in REFUSED:
        raise CachekdError(f"{name!r} cannot be set here", where=where, expected=REFUSED[name])
    if name not in FIELDS:
        near = get_close_matches(name, FIELDS, 1, cutoff=0.8)
        raise CachekdError(
            "the Trainer has no such setting",
            where=where,
            expected="a field of transformers.TrainingArguments",
            found=name,
            fix=RENAMED.get(name, f"did you mean {near[0]!r}?" if near else None),
        )


def _check_choices(training: dict[str, Any]) -> None:
    if training.get("train_sampling_strategy") == "batch_rebalance":
        raise CachekdError(
            "the Trainer rebalances batches of Hugging Face data sets with a column of lengths only",
            where=_where("train_sampling_strategy"),
            expected="random, sequential or group_by_length",
            found="batch_rebalance",
        )
    steps = training.get("max_steps", -1)
    if isinstance(steps, int) and (steps == 0 or steps < -1):
        raise CachekdError(
            "a run of so few steps would be one of `epochs`",
            where=_where("max_steps"),
            expected="at least 1",
            found=steps,
        )
    if training.get("save_strategy") == "best":
        raise CachekdError(
            "a run is gone on with from its last checkpoint, whatever its score",
            where=_where("save_strategy"),
            expected="steps, epoch or no",
            found="best",
            fix="load_best_model_at_end: true beside eval_data keeps the best one too, and ends with it",
        )
    start = training.get("dataloader_multiprocessing_context")
    if start is not None and start not in multiprocessing.get_all_start_methods():
        raise CachekdError(
            "processes cannot be started in this way",
            where=_where("dataloader_multiprocessing_context"),
            expected="one of " + ", ".join(multiprocessing.get_all_start_methods()),
            found=start,
        )
    accelerator = training.get("accelerator_config")
    if isinstance(accelerator, dict) and accelerator.get("dispatch_batches"):
        raise CachekdError(
            "one process cannot read for the others: cached targets are per answer token, and would be cut "
            "by sample",
            where=_where("accelerator_config.dispatch_batches"),
            found=accelerator["dispatch_batches"],
            fix="leave it out: every process reads its own samples",
        )


def _typed(name: str, value: Any) -> Any:
    if name not in _TYPES:
        return value
    try:
        return TypeAdapter(_TYPES[name]).validate_python(value)
    except ValidationError as error:
        raise CachekdError(
            "the Trainer's setting has another type",
            where=_where(name),
            expected=error.errors()[0]["msg"].removeprefix("Input should be "),
            found=repr(value),
        ) from None


def _install(optimizer: str) -> str:
    """How to get an optimizer; of bitsandbytes' the names do not tell."""
    packages = {
        "galore": "galore-torch",
        "lomo": "lomo-optim",
        "adalomo": "lomo-optim",
        "apollo": "apollo-torch",
    }
    packages |= {"8bit": "bitsandbytes", "paged": "bitsandbytes", "ademamix": "bitsandbytes"}
    package = next((package for part, package in packages.items() if part in optimizer), None)
    named = "the package that is named above" if package is None else package
    return f"pip install {named}, or another optim (adamw_torch is the default)"


def _check_reporter(name: str) -> None:
    if name not in INTEGRATION_TO_CALLBACK:
        raise CachekdError(
            "the Trainer reports to no such service",
            where=_where("report_to"),
            expected="among " + ", ".join(sorted(INTEGRATION_TO_CALLBACK)),
            found=name,
        )
    if name in get_available_reporting_integrations():
        return
    try:
        INTEGRATION_TO_CALLBACK[name]()
    except (ImportError, RuntimeError, AssertionError) as error:
        raise CachekdError(
            "this reporter's package is not installed",
            where=_where("report_to"),
            found=_first_line(error),
            fix=f"pip install {name}, or leave it out of report_to",
        ) from None
