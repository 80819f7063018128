"""`TrainConfig` in the Trainer's words."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.vlm import default_device

_FIELDS = {field.name for field in fields(TrainingArguments) if field.init}
# transformers 5.23 renamed it, and warns of the old name.
_CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"
)

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
    "dataloader_num_workers": "workers",
    "bf16": "dtype",
    "fp16": "dtype",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
}
# What would be ignored, or break the loss, in silence.
REFUSED = {
    "remove_unused_columns": "the model's inputs are chosen by the processor",
    "label_names": "answers are found by the chat template",
    "label_smoothing_factor": "the loss is L_CE + lambda_align L_Align + lambda_vsd L_VSD",
    "resume_from_checkpoint": "the same command goes on from the last checkpoint by itself",
    "save_only_model": "a checkpoint without its optimizer cannot be gone on from",
    "do_train": "this is `cachekd train`",
    "do_eval": "`cachekd eval` scores a run",
    "do_predict": "`cachekd eval` scores a run",
    "eval_strategy": "`cachekd eval` scores a run",
    "load_best_model_at_end": "`cachekd eval` scores a run",
    "length_column_name": "lengths are counted from the text",
    "use_liger_kernel": "the head and its losses run in chunks already",
}


def training_arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    """Our settings, then those of the `training` mapping.

    Args:
        out: the Trainer's folder, for checkpoints.

    Raises:
        CachekdError: `training` has an unknown name, one that has a name of ours, or a value that the
            Trainer refuses.
    """
    on_gpu = default_device().type == "cuda"
    workers = default_workers(on_gpu=on_gpu) if config.workers is None else config.workers
    settings: dict[str, Any] = {
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "warmup_steps": config.warmup,  # a share of the steps, as it is below 1
        "lr_scheduler_type": "cosine",
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": not on_gpu,
        "bf16": config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu),
        "fp16": config.dtype == "float16",
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a loss that is not finite stops the run
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,  # they keep shards that are decoded
        "dataloader_pin_memory": on_gpu,
        "accelerator_config": {"non_blocking": on_gpu},
        "ddp_find_unused_parameters": True,  # a vision_feature_layer of -2 leaves the last layer unused
    }
    _check_names(config.training)
    if config.gradient_checkpointing:
        settings[_CHECKPOINTING] = True
        settings[f"{_CHECKPOINTING}_kwargs"] = {"use_reentrant": False}
    try:
        return TrainingArguments(output_dir=str(out), **(settings | config.training))
    except (TypeError, ValueError, ImportError) as error:
        raise CachekdError(
            "the Trainer refuses these settings", where="setting 'training'", found=str(error)
        ) from error


def default_workers(*, on_gpu: bool) -> int:
    """Processes that read ahead: none on a CPU, whose cores the steps need; beside a GPU up to 4, as far as
    this process's share of the cores goes."""
    if not on_gpu:
        return 0
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, share - 1))


def _check_names(training: dict[str, Any]) -> None:
    if training.get("train_sampling_strategy") == "batch_rebalance":
        raise CachekdError(
            "the Trainer rebalances batches of Hugging Face data sets with a column of lengths only",
            where="setting 'training.train_sampling_strategy'",
            expected="random, sequential or group_by_length",
            found="batch_rebalance",
        )
    for name in training:
        where = f"setting 'training.{name}'"
        if name in OWN_NAMES:
            raise CachekdError(
                f"{name!r} has a setting of its own", where=where, fix=f"set `{OWN_NAMES[name]}` instead"
            )
        if name in REFUSED:
            raise CachekdError(f"{name!r} cannot be set here", where=where, expected=REFUSED[name])
        if name not in _FIELDS:
            raise CachekdError(
                "the Trainer has no such setting",
                where=where,
                expected="a field of transformers.TrainingArguments",
                found=name,
            )
