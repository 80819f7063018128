"""Stage two: train a student against a cached teacher, with the visual switch."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from cachekd.cache import CachedTargets, LogitCache
from cachekd.config import TrainConfig, require_new_folder
from cachekd.errors import CachekdError
from cachekd.files import RUN_FILE
from cachekd.fingerprint import library_versions
from cachekd.losses import cross_entropy_loss, dbild_loss
from cachekd.matching import check_cache, check_sample, check_teacher
from cachekd.samples import Encoded, SampleEncoder, Samples, collate, open_samples, predicting_positions
from cachekd.vlm import (
    SwitchedTeacher,
    capture_vision,
    check_switch,
    check_tokenizers,
    default_device,
    default_dtype,
    load_config,
    load_model,
    load_processor,
)

IGNORE = -100


@dataclass(frozen=True)
class TrainSummary:
    """What a run did: where the student is, its steps and wall time, the last value of each term."""

    out: Path
    steps: int
    seconds: float
    terms: dict[str, float]


def train(config: TrainConfig, callbacks: list[TrainerCallback] | None = None) -> TrainSummary:
    """Train a student and save it, with its processor, to `config.out`.

    Raises:
        CachekdError: bad input or a stale cache; nothing is left behind at `config.out`.
    """
    require_new_folder(config.out, "run")
    samples = open_samples(config.data, map=config.map)
    load_config(config.student)
    processor = load_processor(config.student)
    encoder = SampleEncoder(processor)
    cache = open_cache(config, samples, processor, encoder)
    device = default_device()
    teacher = load_switch(config, processor, device)
    if teacher is not None and cache is not None:
        check_teacher(cache, str(config.teacher))
    student = load_model(config.student, dtype=torch.float32, device=device)

    staging = config.out.with_name(f".{config.out.name}.tmp-{os.getpid()}")
    try:
        trainer = SwitchKDTrainer(
            student,
            training_arguments(config, staging, device),
            TrainingSamples(samples, encoder, cache),
            pad_token_id=processor.tokenizer.pad_token_id,
            teacher=teacher,
            lambda_align=config.lambda_align,
            lambda_vsd=config.lambda_vsd,
            temperature=config.temperature,
            callbacks=callbacks,
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        trainer.save_model(str(staging))
        processor.save_pretrained(staging)
        write_run(staging, config, trainer, cache, seconds)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        if config.out.exists():
            config.out.rmdir()  # empty, as checked
        staging.rename(config.out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return TrainSummary(config.out, trainer.state.global_step, seconds, trainer.last_terms)


def open_cache(
    config: TrainConfig, samples: Samples, processor: Any, encoder: SampleEncoder
) -> LogitCache | None:
    """The cache, checked against the student's tokenizer, the template and the data; None for plain CE."""
    if not config.distils:
        return None
    if config.cache is None:
        raise CachekdError(
            "L_Align and L_VSD need the teacher's cached logits",
            where="setting 'cache'",
            fix="pass --cache (`cachekd dump` writes one), or --lambda-align 0 --lambda-vsd 0 for plain CE",
        )
    cache = LogitCache(config.cache)
    check_cache(cache, samples, processor, encoder)
    return cache


def load_switch(config: TrainConfig, processor: Any, device: torch.device) -> SwitchedTeacher | None:
    """P_T, L_T and the head, if L_VSD is on."""
    if config.lambda_vsd == 0:
        return None
    if config.teacher is None:
        raise CachekdError(
            "L_VSD runs the student's visual features through the teacher's projector and language model",
            where="setting 'teacher'",
            fix="pass --teacher, or --lambda-vsd 0 to align the student's own path only",
        )
    check_switch(load_config(config.teacher), load_config(config.student))
    check_tokenizers(load_processor(config.teacher).tokenizer, processor.tokenizer)
    dtype = default_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    return SwitchedTeacher.load(config.teacher, dtype=dtype, device=device)


def training_arguments(config: TrainConfig, out: Path, device: torch.device) -> TrainingArguments:
    """The config in the Trainer's words."""
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return TrainingArguments(
        output_dir=str(out),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,  # a share of the steps, as it is below 1
        lr_scheduler_type="cosine",
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        bf16=bf16,
        fp16=config.dtype == "float16",
        logging_steps=config.logging_steps,
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=True,  # a vision_feature_layer of -2 leaves the last layer unused
    )


class TrainingSamples(Dataset):
    """Encoded samples beside their cached targets, checked against each other."""

    def __init__(self, samples: Samples, encoder: SampleEncoder, cache: LogitCache | None) -> None:
        self.samples, self.encoder, self.cache = samples, encoder, cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Encoded, CachedTargets | None]:
        encoded = self.encoder(self.samples[index])
        if self.cache is None:
            return encoded, None
        targets = self.cache[encoded.key]
        check_sample(self.cache, encoded, targets)
        return encoded, targets


class SwitchKDTrainer(Trainer):
    """A Trainer whose loss is L_CE + lambda_align L_Align + lambda_vsd L_VSD (Switch-KD, section 3).

    Each term is the mean over the answer tokens of a whole optimizer step: sums are divided by the number of
    tokens in all its accumulated batches, so accumulation and batch size do not change the gradient.

    Args:
        student: the model to train.
        args: the Trainer's.
        train_dataset: yields (Encoded, CachedTargets | None).
        pad_token_id: for batches.
        teacher: the switched path; None where `lambda_vsd` is 0.
        lambda_align: weight of the student's own path.
        lambda_vsd: weight of the switched path.
        temperature: of DBiLD.
        callbacks: the Trainer's.

    Raises:
        CachekdError: L_VSD is on but V_S is frozen (it would have no gradient), or there is no teacher.
    """

    # Losses below are divided by the tokens of the whole accumulated step already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: nn.Module,
        args: TrainingArguments,
        train_dataset: Dataset,
        *,
        pad_token_id: int,
        teacher: SwitchedTeacher | None,
        lambda_align: float = 1.0,
        lambda_vsd: float = 1.0,
        temperature: float = 3.0,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if lambda_vsd > 0 and teacher is None:
            raise CachekdError("L_VSD needs a teacher to switch into", fix="pass teacher=, or lambda_vsd=0")
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            data_collator=lambda items: collate_with_targets(items, pad_token_id),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # a caller's progress bar shows the same
        # Some families declare that they take no loss kwargs; then the token count would not be passed.
        self.model_accepts_loss_kwargs = True
        self.teacher = teacher
        self.lambda_align, self.lambda_vsd, self.temperature = lambda_align, lambda_vsd, temperature
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))
        self._tokens = 0
        self.last_terms: dict[str, float] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum over this batch's answer tokens, divided by the step's number of them."""
        inputs = dict(inputs)
        supervised = inputs.pop("labels") != IGNORE
        targets: CachedTargets | None = inputs.pop("targets", None)
        terms = self.loss_terms(model, inputs, supervised, targets)
        count = int(supervised.sum()) if num_items_in_batch is None else num_items_in_batch
        self._remember(terms, int(supervised.sum()))
        weights = {"ce": 1.0, "align": self.lambda_align, "vsd": self.lambda_vsd}
        loss = sum((weights[name] * term for name, term in terms.items()), torch.zeros_like(terms["ce"]))
        loss = loss / count
        return (loss, terms) if return_outputs else loss

    def loss_terms(
        self, model: nn.Module, inputs: dict[str, Tensor], supervised: Tensor, targets: CachedTargets | None
    ) -> dict[str, Tensor]:
        """The terms that are on, each summed over the N answer tokens.

        Args:
            inputs: the batch as the model takes it.
            supervised: [B, S] bool.
            targets: the cached teacher at the same N tokens.
        """
        positions = predicting_positions(supervised)
        answer_ids = inputs["input_ids"][supervised]
        with capture_vision(self.accelerator.unwrap_model(model)) as vision:
            output = model(**inputs, logits_to_keep=positions, use_cache=False)
        logits = output.logits.flatten(0, -2)
        terms = {"ce": cross_entropy_loss(logits, answer_ids, reduction="sum")}
        if self.lambda_align > 0:
            terms["align"] = self._dbild(logits, targets)
        if self.teacher is not None and self.lambda_vsd > 0:
            if vision.output is None or not _has_gradient(vision.output):
                raise CachekdError(
                    "L_VSD has no gradient: it reaches the student's vision encoder only, which is frozen "
                    "or saw no image",
                    fix="train the vision encoder, or set --lambda-vsd 0",
                )
            terms["vsd"] = self._dbild(self.teacher.logits(vision.output, inputs, positions), targets)
        return terms

    def _dbild(self, logits: Tensor, targets: CachedTargets | None) -> Tensor:
        if targets is None:
            raise CachekdError("a distillation term is on, but the samples come without cached targets")
        # Rows that pad a vocabulary beyond the tokenizer's tokens are nobody's prediction.
        return dbild_loss(
            logits[:, : targets.vocab_size],
            targets,
            temperature=self.temperature,
            window=targets.window,
            min_k=targets.min_k,
            reduction="sum",
        )

    def _remember(self, terms: dict[str, Tensor], tokens: int) -> None:
        for name, term in terms.items():
            self._sums[name] += term.detach().float()
        self._tokens += tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term's mean per answer token since the last entry."""
        if "loss" in logs and self._tokens:
            self.last_terms = {name: float(total) / self._tokens for name, total in self._sums.items()}
            logs = logs | self.last_terms
            self._sums.clear()
            self._tokens = 0
        super().log(logs, start_time)


def collate_with_targets(
    items: list[tuple[Encoded, CachedTargets | None]], pad_token_id: int
) -> dict[str, Any]:
    """`collate` with `labels` for the Trainer to count, and the batch's targets as one."""
    batch: dict[str, Any] = collate([encoded for encoded, _ in items], pad_token_id)
    supervised = batch.pop("supervised")
    batch["labels"] = batch["input_ids"].masked_fill(~supervised, IGNORE)
    targets = [target for _, target in items if target is not None]
    if targets:
        batch["targets"] = CachedTargets.cat(targets)
    return batch


def write_run(
    out: Path, config: TrainConfig, trainer: SwitchKDTrainer, cache: LogitCache | None, seconds: float
) -> None:
    """Everything the report needs, beside the model."""
    run = {
        "config": config.model_dump(mode="json"),
        "versions": library_versions(),
        "cache": None if cache is None else cache.manifest.model_dump(mode="json"),
        "k_histogram": None if cache is None else cache.histogram(),
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "log": trainer.state.log_history,
    }
    (out / RUN_FILE).write_text(json.dumps(run, indent=1))


def _has_gradient(output: Any) -> bool:
    tensors = [value for value in output.values() if isinstance(value, Tensor)]
    return any(tensor.requires_grad for tensor in tensors)
