"""Stage two: train a student against a cached teacher, with the visual switch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from cachekd.check.data import RunModels
from cachekd.config import TrainConfig
from cachekd.config.fields import PARTS
from cachekd.data.left_out import LeftOutSamples
from cachekd.losses.terms import TERMS
from cachekd.models import ModelFiles, save_processor
from cachekd.models.fingerprint import library_versions
from cachekd.paths import ADAPTER_FOLDER
from cachekd.train.alignment import AlignedShare, say_what_was_not_aligned
from cachekd.train.callbacks import StopInOrder, advice, never
from cachekd.train.checkpoints import step_of
from cachekd.train.cost import Cost
from cachekd.train.data import TrainingSamples
from cachekd.train.folder import RunFolder, claimed
from cachekd.train.inputs import inputs_of
from cachekd.train.open import OpenRun, load_trainer, open_run
from cachekd.train.size import RunSize, require_room, run_size
from cachekd.train.student import memory_advice, save_merged
from cachekd.train.term_gradients import gradient_name
from cachekd.train.trainer import SwitchKDTrainer
from cachekd.train.validation import saved_evaluation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSummary:
    """What a run did.

    Attributes:
        out: where the student is.
        steps: of the optimizer, those of earlier sessions included.
        seconds: of this session.
        terms: the last value of each, per answer token.
        cost: of all sessions.
        resumed_from: the step that this session went on from; 0 for a new run.
        uncovered: samples that the cache lacks, trained by L_CE alone.
        data_wait: share of this session's time in which the steps waited for data (`DataWait`).
        missing: samples that the cache lacks and that were left out, with reasons.
        bad: samples that were left out because they cannot be used, earlier sessions' included.
        evaluation: on held-out data, of the student that was saved, by the names in the log.
        best_step: whose student was saved, where it is the best one (`load_best_model_at_end`); None: the
            last one was.
        eval_missing, eval_bad: held-out samples that were left out, likewise.
        aligned: across tokenizers, how much of the answers was; None where nothing was to be: both sides read
            text alike, or the student's own logits are not compared.
        eval_differing: held-out samples of which nothing was aligned, as their answers are other bytes for
            the teacher.
        gradients: with `log_term_gradients`, the last logged size of each term's gradient, by term and part.
    """

    out: Path
    steps: int
    seconds: float
    terms: dict[str, float]
    cost: Cost
    resumed_from: int = 0
    uncovered: int = 0
    data_wait: float = 0.0
    missing: LeftOutSamples = field(default_factory=LeftOutSamples)
    bad: LeftOutSamples = field(default_factory=LeftOutSamples)
    evaluation: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    eval_missing: LeftOutSamples = field(default_factory=LeftOutSamples)
    eval_bad: LeftOutSamples = field(default_factory=LeftOutSamples)
    aligned: AlignedShare | None = None
    eval_differing: LeftOutSamples = field(default_factory=LeftOutSamples)
    gradients: dict[str, dict[str, float]] = field(default_factory=dict)


def train(
    config: TrainConfig,
    callbacks: list[TrainerCallback] | None = None,
    *,
    asked_to_stop: Callable[[], int] = never,
    phase: Callable[[str], None] = lambda _: None,
) -> TrainSummary:
    """Train a student and save it, with its processor, to `config.out`.

    The same call resumes a run that was cut short, from its last checkpoint.

    Args:
        asked_to_stop: looked at after each optimizer step; as `StopInOrder` has it.
        phase: told what is read or loaded, until the first step.

    Raises:
        CachekdError: bad input, a stale cache, a finished run, out of memory, a loss that is not finite. A
            run that fails before its first checkpoint leaves nothing behind.
        RunStopped: it was asked to stop; there is a checkpoint of that step.
    """
    with claimed(config) as folder, folder.kept_if_worth_it(), memory_advice(config):
        opened = open_run(config, folder.checkpoints, phase)
        say_what_is_cut(opened.models)
        phase("hashing the student and a part of the data")
        folder.require_inputs(inputs_of(config, opened), processes=opened.arguments.world_size)
        if opened.arguments.should_save:
            require_room(size_of(config, opened), folder.path)
        stopper = StopInOrder(asked_to_stop)
        trainer = load_trainer(config, opened, [*(callbacks or []), stopper], phase)
        if trainer.is_world_process_zero():
            folder.begin()
        checkpoint = folder.last_checkpoint()
        resumed_from = 0 if checkpoint is None else step_of(checkpoint)
        trainer.args.eval_on_start &= checkpoint is None  # when the run began
        trainer.cost.begin()
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        stopper.raise_if_stopped(trainer.state)
        summary = summarised(config.out, opened, trainer, resumed_from, time.perf_counter() - started)
        with folder.finishing():
            save_run(folder, config, opened.models.student, trainer, summary)
    if trainer.is_world_process_zero():
        if summary.aligned is not None:
            say_what_was_not_aligned("samples", summary.aligned.differing)
        say_what_was_not_aligned("held-out samples", summary.eval_differing)
    say_what_would_be_faster(trainer, summary)
    return summary


def summarised(
    out: Path, opened: OpenRun, trainer: SwitchKDTrainer, resumed_from: int, seconds: float
) -> TrainSummary:
    """What this session did; all processes have to ask."""
    bad = trainer.feed.all_bad()
    return TrainSummary(
        out,
        trainer.state.global_step,
        seconds,
        last_terms(trainer.state),
        trainer.cost.cost(trainer.state.global_step),
        resumed_from,
        trainer.train_dataset.uncovered(but=bad),
        trainer.data_wait.total.share,
        opened.missing,
        LeftOutSamples.of(bad),
        aligned=trainer.feed.notes.of_all() if opened.aligns else None,
        gradients=last_gradients(trainer.state),
        **of_held_out(opened, trainer),
    )


def last_terms(state: TrainerState) -> dict[str, float]:
    """The last logged value of each."""
    return {name: entry[name] for entry in state.log_history for name in TERMS if name in entry}


def last_gradients(state: TrainerState) -> dict[str, dict[str, float]]:
    """The last logged size of each term's gradient, by term and part."""
    last = {name: value for entry in state.log_history for name, value in entry.items()}
    found: dict[str, dict[str, float]] = {
        term: {part: last[key] for part in PARTS if (key := gradient_name(term, part)) in last}
        for term in TERMS
    }
    return {term: of for term, of in found.items() if of}


def say_what_would_be_faster(trainer: SwitchKDTrainer, summary: TrainSummary) -> None:
    """Log advice if the steps waited for data."""
    workers, here = trainer.args.dataloader_num_workers, summary.steps - summary.resumed_from
    waited = advice(summary.data_wait, workers, here, summary.seconds)
    if waited is not None and trainer.is_world_process_zero():
        log.warning("%s", waited)


def size_of(config: TrainConfig, opened: OpenRun) -> RunSize:
    """What the run will save."""
    return run_size(config, opened.arguments, len(opened.samples), opened.models, opened.cache)


def of_held_out(opened: OpenRun, trainer: SwitchKDTrainer) -> dict[str, Any]:
    """What a summary says of held-out data; all processes have to ask."""
    if opened.held_out is None or trainer.validation is None:
        return {}
    evaluation, best_step = saved_evaluation(trainer.args, trainer.state)
    if trainer.args.load_best_model_at_end and best_step is None and trainer.is_world_process_zero():
        metric = str(trainer.args.metric_for_best_model).removeprefix("eval_")
        log.warning(
            "no evaluation has a finite eval_%s: the student is that of the last step, not a best one", metric
        )
    bad = LeftOutSamples.of(trainer.validation.bad_samples())
    return {
        "evaluation": evaluation,
        "best_step": best_step,
        "eval_missing": opened.held_out.missing,
        "eval_bad": bad,
        "eval_differing": trainer.validation.differing(),
    }


def say_what_is_cut(models: RunModels) -> None:
    """Samples are cut where the run says so, or its cache: neither in silence. Across tokenizers each model
    may have another limit."""
    limits = (model.limits for model in models if model is not None)
    cut = (each for each in limits if each.too_long == "cut" and each.max_tokens is not None)
    for most in dict.fromkeys(f"{each.max_tokens:,} tokens ({each.max_tokens_of})" for each in cut):
        log.warning("samples of more than %s lose the end of their answers", most)


def save_run(
    folder: RunFolder,
    config: TrainConfig,
    student: ModelFiles,
    trainer: SwitchKDTrainer,
    summary: TrainSummary,
) -> None:
    """The student as a plain model with its processor, and everything the report needs.

    Args:
        student: as it was before.
    """
    data: TrainingSamples = trainer.train_dataset
    across = trainer.terms.across
    limits, held_out = data.encoder.limits, {}
    if trainer.validation is not None:
        held_out = {
            "evaluation": summary.evaluation,
            "best_step": summary.best_step,
            "eval_left_out": {"missing": asdict(summary.eval_missing), "bad": asdict(summary.eval_bad)},
            "eval_differing": asdict(summary.eval_differing),
        }
    trainer.save_model(str(folder.part if config.lora is None else folder.part / ADAPTER_FOLDER))
    trainer.accelerator.wait_for_everyone()  # sharded weights are written by all
    if not trainer.is_world_process_zero():
        return
    folder.take_student()
    if config.lora is not None:
        save_merged(student, folder.path / ADAPTER_FOLDER, folder.part)
        folder.take_student()
    save_processor(data.encoder, folder.path)
    if trainer.bridge is not None:
        trainer.bridge.save(folder.path)
    folder.finish(
        {
            "config": config.model_dump(mode="json"),
            "limits": {"max_tokens": limits.max_tokens, "too_long": limits.too_long},
            "versions": library_versions(),
            "cache": None if data.cache is None else data.cache.manifest.model_dump(mode="json"),
            "k_histogram": None if data.cache is None else data.cache.histogram(),
            "seconds": summary.seconds,
            "steps": summary.steps,
            "cost": summary.cost.model_dump(mode="json"),
            "resumed_from": summary.resumed_from,
            "uncovered_samples": summary.uncovered,
            "left_out": {"missing": asdict(summary.missing), "bad": asdict(summary.bad)},
            **held_out,
            "across_tokenizers": None if across is None else across.summary(summary.aligned),
            "switch_bridge": None if trainer.bridge is None else trainer.bridge.summary(),
            "data_wait": summary.data_wait,
            "log": trainer.state.log_history,
        }
    )
