"""`TrainConfig` in the Trainer's words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cachekd.config import TrainConfig
from cachekd.defaults import SAVE_STEPS
from cachekd.errors import CachekdError
from cachekd.trainer_settings import FIELDS, check_packages, checked_settings, meant_by
from cachekd.validation.settings import validation_settings
from cachekd.vlm import default_device

# transformers 5.23 renamed it, and warns of the old name.
_CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
)


def training_arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    """Our settings, then those of the `training` mapping.

    Args:
        out: the Trainer's folder, for checkpoints.

    Raises:
        CachekdError: `training` has an unknown name, one that has a name of ours, or a value that the
            Trainer refuses, or one whose package is not installed.
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
        "save_steps": config.save_steps or SAVE_STEPS,  # it has to be some number
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
    theirs = checked_settings(config.training, workers=workers)
    settings |= validation_settings(config, theirs)
    if isinstance(theirs.get("accelerator_config"), dict):
        theirs["accelerator_config"] = settings["accelerator_config"] | theirs["accelerator_config"]
    if config.gradient_checkpointing:
        settings[_CHECKPOINTING] = True
        settings[f"{_CHECKPOINTING}_kwargs"] = {"use_reentrant": False}
    try:
        arguments = TrainingArguments(output_dir=str(out), **(settings | theirs))
    except (TypeError, ValueError, ImportError) as error:
        raise CachekdError(
            "the Trainer refuses these settings",
            where=meant_by(error, config.training) or "the settings",
            found=str(error),
        ) from error
    check_packages(arguments)
    return arguments


def require_one_gpu(args: TrainingArguments) -> None:
    """Refuse a process that would spread its batches over several GPUs.

    Raises:
        CachekdError: it sees more than one.
    """
    if args.n_gpu > 1:
        raise CachekdError(
            "one process cannot train on several GPUs here",
            found=f"{args.n_gpu} GPUs",
            fix="one process each: accelerate launch -m cachekd_cli.main train ..., "
            "or one GPU: CUDA_VISIBLE_DEVICES=0",
        )


def default_workers(*, on_gpu: bool) -> int:
    """Processes that read ahead: none on a CPU, whose cores the steps need; beside a GPU up to 4, as far as
    this process's share of the cores goes."""
    if not on_gpu:
        return 0
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, share - 1))
