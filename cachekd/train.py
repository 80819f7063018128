"""Stage two: train a student against a cached teacher, with the visual switch."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from cachekd.bind import Binding, BoundSamples
from cachekd.cache import LogitCache
from cachekd.config import TrainConfig
from cachekd.data_wait import advice
from cachekd.errors import CachekdError
from cachekd.failures import memory_advice
from cachekd.fingerprint import image_processor_fingerprint, library_versions
from cachekd.lean import ADAPTER_FOLDER, load_student, recompute_frozen_layers, save_merged
from cachekd.matching import check_cache, check_teacher
from cachekd.run_folder import RunFolder
from cachekd.samples import SampleEncoder, Samples, open_samples
from cachekd.trainer import SwitchKDTrainer
from cachekd.trainer_settings import explained
from cachekd.training_arguments import training_arguments
from cachekd.training_data import TrainingSamples, collate_with_targets
from cachekd.vlm import (
    LiveTeacher,
    SwitchBridge,
    SwitchedTeacher,
    check_switch,
    check_tokenizers,
    default_dtype,
    load_config,
    load_processor,
    plan_bridge,
)

log = logging.getLogger(__name__)

__all__ = [
    "SwitchKDTrainer",
    "TrainSummary",
    "TrainingSamples",
    "collate_with_targets",
    "make_trainer",
    "train",
    "training_arguments",
]


@dataclass(frozen=True)
class TrainSummary:
    """What a run did.

    Attributes:
        out: where the student is.
        steps: of the optimizer, those of earlier sessions included.
        seconds: of this session.
        terms: the last value of each, per answer token.
        resumed_from: the step that this session went on from; 0 for a new run.
        uncovered: samples that the cache lacks, trained by L_CE alone.
        data_wait: share of this session's time in which the steps waited for data (`DataWait`).
    """

    out: Path
    steps: int
    seconds: float
    terms: dict[str, float]
    resumed_from: int = 0
    uncovered: int = 0
    data_wait: float = 0.0


def train(config: TrainConfig, callbacks: list[TrainerCallback] | None = None) -> TrainSummary:
    """Train a student and save it, with its processor, to `config.out`.

    The same call goes on from the last checkpoint of a run that was cut short.

    Raises:
        CachekdError: bad input, a stale cache, a finished run, out of memory, a loss that is not finite. A
            run that fails before its first checkpoint leaves nothing behind.
    """
    folder = RunFolder(config)
    with memory_advice(config):
        trainer = make_trainer(config, folder.checkpoints, callbacks)
        folder.require_inputs(trainer.train_dataset.cache, config.binding)
        with folder.begun(main=trainer.is_world_process_zero()):
            checkpoint = folder.last_checkpoint()
            resumed_from = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
            started = time.perf_counter()
            trainer.train(resume_from_checkpoint=checkpoint)
            seconds = time.perf_counter() - started
            summary = TrainSummary(
                config.out,
                trainer.state.global_step,
                seconds,
                trainer.last_terms,
                resumed_from,
                trainer.train_dataset.uncovered,
                trainer.data_wait.total.share,
            )
            save_run(folder, config, trainer, summary)
    workers = trainer.args.dataloader_num_workers
    waited = advice(summary.data_wait, workers, summary.steps - resumed_from, seconds)
    if waited is not None and trainer.is_world_process_zero():
        log.warning("%s", waited)
    return summary


def make_trainer(
    config: TrainConfig, checkpoints: Path, callbacks: list[TrainerCallback] | None = None
) -> SwitchKDTrainer:
    """Everything read, checked and loaded, ready to train.

    Args:
        checkpoints: where the Trainer writes; it does not have to exist.
    """
    config.require_inputs()
    samples: Samples = open_samples(config.data, map=config.map)
    if config.binding is not None:
        samples = BoundSamples(samples, Binding.read(config.binding))
    load_config(config.student)
    processor = load_processor(config.student)
    encoder = SampleEncoder(processor)
    cache = open_cache(config, samples, processor, encoder)
    arguments = training_arguments(config, checkpoints)
    bridge = switch_bridge(config)
    teacher = load_teacher(config, processor, arguments.device)
    if teacher is not None and cache is not None:
        check_teacher(cache, str(config.teacher))
    live, teacher_encoder = None, None
    if config.live_teacher and teacher is not None:
        live, teacher_encoder = live_teacher(config, teacher, processor)
    if bridge is not None and bridge.plan.other_text and teacher_encoder is None:
        teacher_encoder = SampleEncoder(load_processor(str(config.teacher)))
    set_seed(config.seed)  # adapters begin at random
    student = load_student(config, arguments.device)
    data = TrainingSamples(samples, encoder, cache, teacher_encoder)
    with explained(config.training):
        trainer = SwitchKDTrainer(
            student,
            arguments,
            data,
            pad_token_id=encoder.pad_token_id,
            teacher=teacher,
            live=live,
            bridge=bridge,
            lambda_align=config.lambda_align,
            lambda_vsd=config.lambda_vsd,
            vsd_every=config.vsd_every,
            temperature=config.temperature,
            logit_chunk=config.logit_chunk,
            callbacks=callbacks,
        )
        trainer.get_optimizer_cls_and_kwargs(arguments, student)  # some look for their modules in the model
    return trainer


def open_cache(
    config: TrainConfig, samples: Samples, processor: Any, encoder: SampleEncoder
) -> LogitCache | None:
    """The cache, checked against the student's tokenizer, the template and the data; None if none is used."""
    if not config.distils or config.live_teacher:
        return None
    assert config.cache is not None  # as `require_inputs` saw
    cache = LogitCache(config.cache)
    if config.binding is not None:
        Binding.read(config.binding).require_cache(cache, str(config.binding))
    check_cache(cache, samples, processor, encoder, may_lack_samples=config.missing == "ce-only")
    codec = cache.manifest.codec
    for name, theirs in (("window", codec.window), ("min_k", codec.min_k)):
        ours = getattr(config, name)
        if ours not in (None, theirs):
            raise CachekdError(
                "the cache was made with another Kneedle setting",
                where=f"setting {name!r}",
                expected=f"{theirs}, as in {cache.path}",
                found=ours,
                fix=f"leave {name!r} out: a cache has its own",
            )
    return cache


def load_teacher(config: TrainConfig, processor: Any, device: torch.device) -> SwitchedTeacher | None:
    """P_T, L_T and the head, if L_VSD is on; the vision encoder too, if the teacher is live."""
    if not config.runs_teacher:
        return None
    assert config.teacher is not None  # as `require_inputs` saw
    if config.lambda_vsd > 0 and config.switch_bridge is None:
        check_switch(load_config(config.teacher), load_config(config.student))
    check_tokenizers(load_processor(config.teacher).tokenizer, processor.tokenizer)
    teacher = SwitchedTeacher.load(
        config.teacher,
        dtype=default_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype),
        device=device,
        quantization=config.teacher_quantization,
        with_tower=config.live_teacher,
    )
    if config.gradient_checkpointing:
        recompute_frozen_layers(teacher.model)
    return teacher


def switch_bridge(config: TrainConfig) -> SwitchBridge | None:
    """The bridge between V_S and P_T, where one is asked for; what it is goes into the log.

    Raises:
        CachekdError: it is not needed, or not sound for this pair.
    """
    if config.switch_bridge is None:
        return None
    plan = plan_bridge(load_config(str(config.teacher)), load_config(config.student))
    bridge = SwitchBridge(plan, config.seed)
    log.warning(
        "L_VSD runs through a trained bridge, which is beyond the paper: %s, %s parameters",
        plan,
        f"{bridge.describe()['parameters']:,}",
    )
    return bridge


def live_teacher(
    config: TrainConfig, teacher: SwitchedTeacher, processor: Any
) -> tuple[LiveTeacher, SampleEncoder | None]:
    """The teacher in the cache's place, and its own encoder if it prepares images in another way.

    Raises:
        CachekdError: it has another chat template, which a cache would be refused for.
    """
    own = load_processor(str(config.teacher))
    if SampleEncoder(own).template != SampleEncoder(processor).template:
        raise CachekdError(
            "teacher and student have different chat templates",
            where=f"{config.teacher} and {config.student}",
            fix="save the teacher's chat_template.jinja beside the student's processor",
        )
    rows = teacher.model.get_output_embeddings().weight.shape[0]
    live = LiveTeacher(
        teacher,
        vocab_size=min(len(own.tokenizer), rows),
        window=config.window or 128,
        min_k=config.min_k or 2,
    )
    same = image_processor_fingerprint(own) == image_processor_fingerprint(processor)
    return live, None if same else SampleEncoder(own)


def save_run(folder: RunFolder, config: TrainConfig, trainer: SwitchKDTrainer, summary: TrainSummary) -> None:
    """The student as a plain model with its processor, and everything the report needs."""
    data: TrainingSamples = trainer.train_dataset
    trainer.save_model(str(folder.path if config.lora is None else folder.path / ADAPTER_FOLDER))
    if not trainer.is_world_process_zero():
        return
    if config.lora is not None:
        save_merged(config, folder.path)
    data.encoder.processor.save_pretrained(folder.path)
    if trainer.bridge is not None:
        trainer.bridge.save(folder.path)
    folder.finish(
        {
            "config": config.model_dump(mode="json"),
            "versions": library_versions(),
            "cache": None if data.cache is None else data.cache.manifest.model_dump(mode="json"),
            "k_histogram": None if data.cache is None else data.cache.histogram(),
            "seconds": summary.seconds,
            "steps": summary.steps,
            "resumed_from": summary.resumed_from,
            "uncovered_samples": summary.uncovered,
            "switch_bridge": None if trainer.bridge is None else trainer.bridge.describe(),
            "data_wait": summary.data_wait,
            "log": trainer.state.log_history,
        }
    )
