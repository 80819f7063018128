"""The Trainer's arguments: with our defaults, from `TrainConfig`, and without what our runs cannot have."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, get_type_hints

from pydantic import TypeAdapter, ValidationError
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.integrations import integration_utils as reporters

from cachekd.config import TrainConfig
from cachekd.config.fields import SAVE_STEPS
from cachekd.errors import CachekdError, did_you_mean
from cachekd.models import default_device
from cachekd.train.callbacks import usable_cores

ACCURACY = "token_accuracy"  # share of answer tokens whose argmax is right
FIELDS = {field.name for field in fields(TrainingArguments) if field.init}
# Plain ones, which pydantic checks, and reads as YAML's 1e-8 without a point is meant (a text, to YAML).
_PLAIN = {bool, int, float, bool | None, int | None, float | None}
_TYPES = {name: hint for name, hint in get_type_hints(TrainingArguments).items() if hint in _PLAIN}
# transformers 5.23 renamed it, and warns of the old name.
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
)

# The Trainer's name -> ours, of the same value. One setting has one name.
_SAME = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "most_samples",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup",  # a share of the steps, as it is below 1
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "logging_steps": "logging_steps",
}
OWN_NAMES = _SAME | {
    "per_device_train_batch_size": "batch_size",
    "output_dir": "out",
    "warmup_ratio": "warmup",
    "save_steps": "save_steps",
    "do_eval": "eval_data",
    "eval_steps": "eval_steps",
    "dataloader_num_workers": "workers",
    "bf16": "dtype",
    "fp16": "dtype",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
}
# Names of earlier versions of the Trainer, and what to set now.
_RENAMED = {
    "group_by_length": "training: {train_sampling_strategy: group_by_length}",
    "logging_dir": "TENSORBOARD_LOGGING_DIR in the environment",
}
_NO_LOGITS = "an evaluation on eval_data adds terms up; it keeps no logits"
_AS_IT_TRAINS = "the student is evaluated in the dtype that it trains in"
# What can only be as it is: it would be ignored, or break the loss, in silence.
REFUSED = {
    "remove_unused_columns": "the model's inputs are chosen by the processor",
    "label_names": "answers are found by the chat template",
    "label_smoothing_factor": "the loss is L_CE + lambda_align L_Align + lambda_vsd L_VSD",
    "resume_from_checkpoint": "the same command goes on from the last checkpoint by itself",
    "save_only_model": "a checkpoint without its optimizer cannot be gone on from",
    "do_train": "this is `cachekd train`",
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
_ORDERS = ("random", "sequential", "group_by_length")
_STARTS = multiprocessing.get_all_start_methods()


@dataclass
class SwitchKDTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for a `SwitchKDTrainer`; every other default is the Trainer's own.

    Attributes:
        batch_tokens: padded tokens per device and batch, beside the Trainer's number of samples; None: any.

    Raises:
        CachekdError: a value that would be ignored, break the loss or fail once the models are loaded; the
            package of the optimizer or of a reporter is not installed; several GPUs in one process.
    """

    batch_tokens: int | None = None
    lr_scheduler_type: SchedulerType | str = "cosine"
    logging_first_step: bool = True
    logging_nan_inf_filter: bool = False  # a loss that is not finite stops the run
    save_total_limit: int | None = 2
    disable_tqdm: bool | None = True
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = True  # a vision_feature_layer of -2 leaves the last unused
    teacher_apart: bool = False  # a device map says where the teacher is

    @classmethod
    def of(cls, config: TrainConfig, out: Path) -> Self:
        """Our settings, then those of the `training` mapping.

        Args:
            out: the Trainer's folder, for checkpoints.

        Raises:
            CachekdError: `training` has an unknown name, one that has a name of ours, a value of another
                type, or one that the Trainer or the class refuses; the setting is named.
        """
        on_gpu = default_device().type != "cpu"
        workers = default_workers(on_gpu=on_gpu) if config.workers is None else config.workers
        settings = {theirs: getattr(config, ours) for theirs, ours in _SAME.items()} | {
            "output_dir": str(out),
            "batch_tokens": config.batch_tokens,
            "data_seed": config.seed,
            "use_cpu": not on_gpu,
            "teacher_apart": config.teacher_load_settings["device_map"] is not None,
            "bf16": config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu),
            "fp16": config.dtype == "float16",
            "save_strategy": "steps" if config.save_steps else "no",
            "save_steps": config.save_steps or SAVE_STEPS,  # it has to be some number
            "dataloader_num_workers": workers,
            "dataloader_persistent_workers": workers > 0,  # they keep shards that are decoded
            "dataloader_pin_memory": on_gpu,
            "accelerator_config": {"non_blocking": on_gpu},
        }
        if config.gradient_checkpointing:
            settings |= {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
        if config.eval_data is not None:
            settings |= _of_held_out(config)
        training = {name: _checked(name, value, config) for name, value in config.training.items()}
        if isinstance(training.get("accelerator_config"), dict):
            training["accelerator_config"] = settings["accelerator_config"] | training["accelerator_config"]
        with explained(config.training, "the settings"):
            return cls(**settings | training)

    def __post_init__(self) -> None:
        for name, expected in self._wrong_values():
            raise _refusal(name, expected, getattr(self, name))
        super().__post_init__()
        if self.accelerator_config.dispatch_batches:  # known now, as it may stand in a file
            expected = "that every process reads its own samples: cached targets cannot be cut by sample"
            raise _refusal("accelerator_config.dispatch_batches", expected, True)
        self._require_packages()
        if self.teacher_apart:
            self._n_gpu = min(self.n_gpu, 1)  # the student's; the teacher is on the others
        if self.n_gpu > 1:
            raise CachekdError(
                "one process cannot train on several GPUs here",
                found=f"{self.n_gpu} GPUs",
                fix="one process each: accelerate launch -m cachekd_cli.main train ..., "
                "or one GPU: CUDA_VISIBLE_DEVICES=0",
            )

    def __reduce__(self) -> Any:
        """Pickle as plain `TrainingArguments`: the Trainer does so beside every model (training_args.bin),
        and no file of a run is to depend on where this class stands."""
        return object.__new__, (TrainingArguments,), vars(self)

    def _wrong_values(self) -> Iterator[tuple[str, str]]:
        """Settings that cannot have the value that they have, and what is expected."""
        for name, reason in REFUSED.items():
            if getattr(self, name) != getattr(type(self), name, []):  # a list is no default of a class
                yield name, reason
        for name in ("multiprocessing_context", "persistent_workers", "prefetch_factor"):
            if getattr(self, f"dataloader_{name}") and not self.dataloader_num_workers:
                yield f"dataloader_{name}", "processes that read samples, such as --workers 1 has"
        if self.dataloader_multiprocessing_context not in (None, *_STARTS):
            yield "dataloader_multiprocessing_context", f"one of {', '.join(_STARTS)}"
        if self.train_sampling_strategy not in _ORDERS:
            yield "train_sampling_strategy", f"one of {', '.join(_ORDERS)}"
        if self.batch_tokens is not None and self.train_sampling_strategy != "random":
            yield "train_sampling_strategy", "random: batches of batch_tokens are of similar length already"
        if self.batch_tokens is not None and self.dataloader_drop_last:
            yield "dataloader_drop_last", "false: of batch_tokens no batch is cut short"
        if self.batch_tokens is not None and getattr(self.accelerator_config, "split_batches", False):
            yield "accelerator_config.split_batches", "false: batches of batch_tokens are each process's own"
        if self.max_steps == 0 or self.max_steps < -1:
            yield "max_steps", "at least 1"
        if self.save_strategy == "best":
            yield "save_strategy", "steps, epoch or no; load_best_model_at_end: true keeps the best one too"
        if self.load_best_model_at_end and self.save_strategy == "no":
            yield "load_best_model_at_end", "save_steps above 0: it is loaded from its checkpoint"
        if self.load_best_model_at_end and self.save_total_limit == 1:
            yield "save_total_limit", "at least 2 beside load_best_model_at_end: one to go on from"
        if "underflow_overflow" in (self.debug or ()):
            yield "debug", "none: it looks at logits, which are put off; what is not finite is saved anyway"

    def _require_packages(self) -> None:
        """Raise what the Trainer would raise once the models are loaded, of optimizer and reporters."""
        try:
            Trainer.get_optimizer_cls_and_kwargs(self)
        except (ValueError, TypeError, NotImplementedError) as error:
            if "install" in str(error):
                raise  # the others need the model, and are asked again with it
        reporters.get_reporting_integration_callbacks(self.report_to)  # refuses names that it does not know
        known = {*reporters.get_available_reporting_integrations(), "flyte", "kubeflow"}  # never in that list
        for name in sorted(set(self.report_to) - known):
            package = {"azure_ml": "azureml-sdk"}.get(name, name)
            raise ImportError(f"report_to {name}: its package is not installed: pip install {package}")


def default_workers(*, on_gpu: bool) -> int:
    """Processes that read ahead: none on a CPU, whose cores the steps need; beside a GPU up to 4, as far as
    this process's share of the cores goes."""
    if not on_gpu:
        return 0
    return max(1, min(4, usable_cores() - 1))


def metric_of(config: TrainConfig, terms: tuple[str, ...]) -> str:
    """Name what students are compared by, without the Trainer's prefix.

    Args:
        terms: that are computed on the held-out data, as far as is known.

    Raises:
        CachekdError: the metric is not among what is computed.
    """
    said = config.training.get("metric_for_best_model") or "loss"
    metric = str(said).removeprefix("eval_")
    computed = ("loss", *terms, ACCURACY)
    if metric in computed:
        return metric
    fix = None
    if metric in config.terms:
        fix = "--eval-cache, the teacher's cache of eval_data"
        if config.eval_is_taught:
            fix = "eval_data with pictures: none of these has one"
    names = ", ".join(f"eval_{name}" for name in computed)
    raise _refusal("metric_for_best_model", f"one of {names}: these are computed on eval_data", said, fix)


@contextmanager
def explained(training: dict[str, Any], where: str | None = None) -> Iterator[None]:
    """What the Trainer refuses within, said as the fault of the settings in the `training` mapping.

    Args:
        where: what is at fault if there are none; None: the error is let through.

    Raises:
        CachekdError: the Trainer's words, and the settings whose name or value they have in them, or all of
            them.
    """
    try:
        yield
    except (ImportError, TypeError, ValueError, AttributeError, NotImplementedError, OSError) as error:
        text = str(error) or type(error).__name__
        texts = {name: value if isinstance(value, str) else name for name, value in training.items()}
        meant = [name for name, value in texts.items() if name in text or value in text] or training
        places = ", ".join(f"setting 'training.{name}'" for name in meant) or where
        if places is None:
            raise
        raise CachekdError("the Trainer refuses these settings", where=places, found=text) from error


def _of_held_out(config: TrainConfig) -> dict[str, Any]:
    """When to evaluate, and what a better student is; by default every `eval_steps`, and by `eval_loss`."""
    strategy = config.training.get("eval_strategy", "steps")
    if strategy == "no":
        raise _refusal("eval_strategy", "steps or epoch, as there are held-out data", strategy)
    if strategy == "epoch" and config.eval_steps is not None:
        raise _refusal("eval_strategy", "steps, or no eval_steps", strategy)
    return {
        "eval_strategy": "steps",
        "eval_steps": config.eval_steps or SAVE_STEPS,
        "per_device_eval_batch_size": config.most_samples,
        # The Trainer takes every name that does not end in "loss" for one that ought to grow.
        "greater_is_better": metric_of(config, config.eval_terms) == ACCURACY,
    }


def _checked(name: str, value: Any, config: TrainConfig) -> Any:
    """A value of the `training` mapping, a number as a number."""
    if name in OWN_NAMES:
        raise _refusal(name, fix=f"set `{OWN_NAMES[name]}` at the top level, outside `training`")
    if name not in FIELDS:
        near = get_close_matches(name, FIELDS, 1, cutoff=0.8)
        meant = _RENAMED.get(name, did_you_mean(repr(near[0]) if near else None))
        raise _refusal(name, "a field of transformers.TrainingArguments", fix=meant)
    if config.eval_data is None and name not in REFUSED and re.search("eval|best|is_better", name):
        raise _refusal(name, "held-out data to evaluate", fix="--eval-data PATH")
    try:
        return TypeAdapter(_TYPES.get(name, Any)).validate_python(value)
    except ValidationError as error:
        raise _refusal(name, error.errors()[0]["msg"].removeprefix("Input should be "), value) from None


def _refusal(name: str, expected: Any = None, found: Any = None, fix: str | None = None) -> CachekdError:
    problem = f"{name!r} cannot be {'set' if found is None else repr(found)} here"
    return CachekdError(problem, where=f"setting 'training.{name}'", expected=expected, fix=fix)
