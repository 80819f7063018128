"""Stage two: train a student against a cached teacher, with the visual switch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from cachekd.bind import Binding, BoundSamples
from cachekd.cache import LogitCache
from cachekd.config import TrainConfig
from cachekd.data_wait import MOST
from cachekd.errors import CachekdError
from cachekd.failures import memory_advice
from cachekd.files import ADAPTER_FOLDER
from cachekd.fingerprint import image_processor_fingerprint, library_versions
from cachekd.lean import load_student, recompute_frozen_layers, save_merged
from cachekd.matching import check_cache, check_teacher
from cachekd.run_folder import RunFolder
from cachekd.run_inputs import inputs_of
from cachekd.samples import SampleEncoder, Samples, open_samples
from cachekd.stopping import StopInOrder, never
from cachekd.trainer import SwitchKDTrainer, require_one_gpu
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


def train(
    config: TrainConfig,
    callbacks: list[TrainerCallback] | None = None,
    *,
    asked_to_stop: Callable[[], int] = never,
    phase: Callable[[str], None] = lambda _: None,
) -> TrainSummary:
    """Train a student and save it, with its processor, to `config.out`.

    The same call goes on from the last checkpoint of a run that was cut short.

    Args:
        asked_to_stop: looked at after each optimizer step; as `StopInOrder` has it.
        phase: told what is read or loaded, until the first step.

    Raises:
        CachekdError: bad input, a stale cache, a finished run, out of memory, a loss that is not finite. A
            run that fails before its first checkpoint leaves nothing behind.
        RunStopped: it was asked to stop; there is a checkpoint of that step.
    """
    folder = RunFolder(config)
    with folder.kept_if_worth_it(), memory_advice(config):
        opened = open_run(config, folder.checkpoints, phase)
        phase("hashing the student and a part of the data")
        found = inputs_of(config, opened.samples, opened.cache, folder.known)
        folder.require_inputs(found, processes=opened.arguments.world_size)
        stopper = StopInOrder(asked_to_stop)
        trainer = load_trainer(config, opened, [*(callbacks or []), stopper], phase)
        if trainer.is_world_process_zero():
            folder.begin()
        checkpoint = folder.last_checkpoint()
        resumed_from = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        stopper.raise_if_stopped(trainer.state)
        summary = TrainSummary(
            config.out,
            trainer.state.global_step,
            time.perf_counter() - started,
            trainer.last_terms,
            resumed_from,
            trainer.train_dataset.uncovered,
            trainer.data_wait.total.share,
        )
        with folder.finishing():
            save_run(folder, config, trainer, summary)
    if trainer.is_world_process_zero():
        warn_of_waiting(summary, trainer.args.dataloader_num_workers)
    return summary


def warn_of_waiting(summary: TrainSummary, workers: int) -> None:
    """Say how many workers to try, where the steps waited for their data."""
    if summary.data_wait > MOST:
        log.warning(
            "the steps waited for data in %.1f %% of the time: --workers %d reads ahead in as many processes",
            100 * summary.data_wait,
            workers + 2,
        )


@dataclass(frozen=True)
class OpenRun:
    """What a run reads, checked as far as it can be without any model's weights in memory."""

    samples: Samples
    processor: Any
    encoder: SampleEncoder
    cache: LogitCache | None
    arguments: TrainingArguments


def make_trainer(
    config: TrainConfig,
    checkpoints: Path,
    callbacks: list[TrainerCallback] | None = None,
    phase: Callable[[str], None] = lambda _: None,
) -> SwitchKDTrainer:
    """Everything read, checked and loaded, ready to train.

    Args:
        checkpoints: where the Trainer writes; it does not have to exist.
        phase: told what is read or loaded.
    """
    return load_trainer(config, open_run(config, checkpoints, phase), callbacks, phase)


def open_run(config: TrainConfig, checkpoints: Path, phase: Callable[[str], None]) -> OpenRun:
    """Data, cache, processors and settings; whatever can be refused is refused before weights are loaded.

    Raises:
        CachekdError: what does not go together, or a run of no steps.
    """
    config.require_inputs()
    phase("opening the data")
    samples: Samples = open_samples(config.data, map=config.map)
    if config.binding is not None:
        samples = BoundSamples(samples, Binding.read(config.binding))
    load_config(config.student)
    processor = load_processor(config.student)
    encoder = SampleEncoder(processor)
    phase("opening the cache" if config.distils and not config.live_teacher else "reading the settings")
    cache = open_cache(config, samples, processor, encoder)
    arguments = training_arguments(config, checkpoints)
    require_one_gpu(arguments)
    require_steps(len(samples), arguments)
    if config.runs_teacher:
        phase("comparing the teacher with the student and the cache")
        check_the_teacher(config, processor, cache)
    return OpenRun(samples, processor, encoder, cache, arguments)


def require_steps(samples: int, arguments: TrainingArguments) -> None:
    """Refuse a run whose every epoch drops its only batch: it would end at once, the student untrained.

    Raises:
        CachekdError: `dataloader_drop_last` is on, and all samples are fewer than one batch.
    """
    a_batch = arguments.per_device_train_batch_size * arguments.world_size
    if not arguments.dataloader_drop_last or samples >= a_batch:
        return
    raise CachekdError(
        "the run would have no steps: the only batch is not full, and it is dropped",
        where="settings 'batch_size' and 'training.dataloader_drop_last'",
        expected=f"at least {a_batch} samples, one batch of {arguments.world_size} process(es)",
        found=f"{samples} samples",
        fix=f"--batch-size {max(1, samples // arguments.world_size)}, or leave dataloader_drop_last out",
    )


def load_trainer(
    config: TrainConfig,
    opened: OpenRun,
    callbacks: list[TrainerCallback] | None,
    phase: Callable[[str], None],
) -> SwitchKDTrainer:
    """The models' weights, and the Trainer with all of it."""
    bridge = switch_bridge(config)
    teacher = None
    if config.runs_teacher:
        phase("loading the teacher")
        teacher = load_teacher(config, opened.arguments.device)
    live, teacher_encoder = None, None
    if config.live_teacher and teacher is not None:
        live, teacher_encoder = live_teacher(config, teacher, opened.processor)
    if bridge is not None and bridge.plan.other_text and teacher_encoder is None:
        teacher_encoder = SampleEncoder(load_processor(str(config.teacher)))
    phase("loading the student")
    set_seed(config.seed)  # adapters begin at random
    student = load_student(config, opened.arguments.device)
    phase("reading the first sample")
    return SwitchKDTrainer(
        student,
        opened.arguments,
        TrainingSamples(opened.samples, opened.encoder, opened.cache, teacher_encoder),
        pad_token_id=opened.encoder.pad_token_id,
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


def check_the_teacher(config: TrainConfig, processor: Any, cache: LogitCache | None) -> None:
    """What its files say, without a model of them; their bytes are hashed last, as it takes longest.

    Raises:
        CachekdError: the pair cannot be switched, has other tokens or another template, or the cache is of
            another teacher.
    """
    assert config.teacher is not None  # as `require_inputs` saw
    if config.lambda_vsd > 0 and config.switch_bridge is None:
        check_switch(load_config(config.teacher), load_config(config.student))
    theirs = load_processor(config.teacher)
    check_tokenizers(theirs.tokenizer, processor.tokenizer)
    if config.live_teacher and SampleEncoder(theirs).template != SampleEncoder(processor).template:
        raise CachekdError(
            "teacher and student have different chat templates",
            where=f"{config.teacher} and {config.student}",
            fix="save the teacher's chat_template.jinja beside the student's processor",
        )
    if cache is not None:
        check_teacher(cache, config.teacher)


def load_teacher(config: TrainConfig, device: torch.device) -> SwitchedTeacher:
    """P_T, L_T and the head; the vision encoder too, if the teacher is live."""
    teacher = SwitchedTeacher.load(
        str(config.teacher),
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
    """The teacher in the cache's place, and its own encoder if it prepares images in another way."""
    own = load_processor(str(config.teacher))
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
