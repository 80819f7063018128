"""What can be known of the steps before the first of them begins, so that it is not found out in ten hours:
the checks of their own commands, and whether what one step will make is what another takes.

No weights are loaded: settings, configurations, processors, and whether data and caches are there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from cachekd.cache import LogitCache
from cachekd.check.bind import Binding
from cachekd.check.data import RunModels, checked_cache, length_settings, require_kneedle
from cachekd.check.match import check_quantization
from cachekd.check.missing import DECIDING
from cachekd.check.rows import require
from cachekd.check.text import require_text_alike
from cachekd.config import DataOptions, DumpConfig, EvalConfig, ReportConfig, TrainConfig
from cachekd.data import Samples, open_samples
from cachekd.data.open import require_there
from cachekd.dump.plan import codec_of, require_vocabulary
from cachekd.errors import CachekdError, about
from cachekd.evaluate.inputs import open_cache as open_asked_cache
from cachekd.evaluate.inputs import open_models
from cachekd.evaluate.questions import require_single_questions
from cachekd.lmms.run import require_benchmarks
from cachekd.models import ModelFiles, default_device, dtype_of
from cachekd.paths import RUN_FILE, is_address
from cachekd.pipeline.plan import PlannedStep
from cachekd.train.folder import CHECKPOINTS
from cachekd.train.held_out import require_same_teacher
from cachekd.train.open import check_attention, checked_arguments, require_steps, teacher_rows
from cachekd.train.student import require_adapters
from cachekd.train.teacher import say_how_it_is_quantised


def check_steps(steps: list[PlannedStep]) -> None:
    """Refuse now what a step would be refused for when its turn comes.

    Args:
        steps: all that are to run.

    Raises:
        CachekdError: the first that is wrong; the step is named.
    """
    made = _ToBeMade(steps)
    for step in steps:
        with about(step.name, what=step.what):
            _CHECKS[step.kind](step.config, made)
            for setting, data in step.data.items():
                with about(setting) if setting != "data" else nullcontext():
                    require_there(data)


class _ToBeMade:
    """What the steps that are to run will make, by its folder. What others made is there.

    Attributes:
        students: of train steps: what such a step makes has the files of the one that it begins from.
        dumps: the settings of dump steps.
    """

    def __init__(self, steps: list[PlannedStep]) -> None:
        self.students = {str(step.out): step.config.student for step in steps if step.kind == "train"}
        self.dumps = {str(step.out): step.config for step in steps if step.kind == "dump"}
        self.files = cache(ModelFiles)  # each once
        self._samples: dict[str, Samples] = {}

    def model(self, name: str) -> ModelFiles:
        """The files, which are there, of a model or of the one that it begins from; it can read samples."""
        files = self.files(self.source(name))
        _ = files.encoder
        return files

    def source(self, name: str) -> str:
        """The model, which is there, that this one begins from."""
        while name in self.students:
            name = self.students[name]
        return name

    def here(self, data: DataOptions) -> Samples | None:
        """Data on this disk, opened once; others are not fetched for a check."""
        if not data.is_local:
            return None
        said = data.model_dump_json(include=set(DataOptions.model_fields))
        if said not in self._samples:
            self._samples[said] = open_samples(data)
        return self._samples[said]


def _check_dump(config: DumpConfig, made: _ToBeMade) -> None:
    codec_of(config)
    teacher = made.model(config.teacher)
    require_vocabulary(config, teacher)
    teacher.require_attention(config.attn_implementation)
    teacher.require_device_map(config.load_settings["device_map"])
    teacher.quantization(config.quantization, dtype_of(config.dtype, default_device()))


def _check_train(config: TrainConfig, made: _ToBeMade) -> None:
    arguments = checked_arguments(config, config.out / CHECKPOINTS)
    if config.binding is not None:
        Binding.read(config.binding)
    teacher = made.model(str(config.teacher)) if config.runs_teacher else None
    models, samples = RunModels(made.model(config.student), teacher), made.here(config)
    check_attention(config, models)
    require_adapters(config, models.student)
    if samples is not None:
        require_steps(len(samples), arguments)
    cache = _check_cache(config, models, samples, made)
    if teacher is not None:
        teacher.require_device_map(config.teacher_load_settings["device_map"])
        say_how_it_is_quantised(config, teacher, cache, arguments.device)
        require(teacher_rows(config, models.student, teacher, samples, cache))
    if (held_out := config.on_held_out()) is not None and held_out.cache is not None:
        with about("eval_cache"):
            eval_cache = _check_cache(held_out, models, made.here(held_out), made)
            if cache is not None and eval_cache is not None:
                require_same_teacher(config, cache, eval_cache)


def _check_cache(
    config: TrainConfig, models: RunModels, samples: Samples | None, made: _ToBeMade
) -> LogitCache | None:
    """The cache, if it is there. Of one that a dump will make, its teacher and data tell; one at an address
    is fetched when its step begins.

    Args:
        samples: of the step; None where they are not opened now.

    Raises:
        CachekdError: it does not match the student, or lacks samples or may, and the step does not say what
            to do with them, or would stop at them.
    """
    if (dump := made.dumps.get(str(config.cache))) is not None:
        teacher = made.model(dump.teacher)
        if not config.crosses:
            require_text_alike(teacher, models.student)
        require_kneedle(config, dump, str(config.cache))
        _require_same_teacher(config, dump, made)
        _require_same_quantization(config, dump, made)
        if config.binding is None:
            _check_coverage(config, samples, dump, made)
    elif config.cache is not None and not is_address(config.cache):
        return checked_cache(config, models, samples).cache
    return None


def _require_same_teacher(config: TrainConfig, dump: DumpConfig, made: _ToBeMade) -> None:
    """Will the switched path run through the teacher that is dumped? As `check_teacher` asks of a cache."""
    if not config.switches or config.teacher == dump.teacher:
        return
    names = (dump.teacher, str(config.teacher))
    theirs, ours = map(made.model, names)
    of_a_teacher = ("config_sha256", "image_processing", "weights")  # the last may take a while
    is_same = all(getattr(theirs, name) == getattr(ours, name) for name in of_a_teacher)
    if not is_same or not made.students.keys().isdisjoint(names):
        raise CachekdError(
            "the cache will be of another teacher than the one that the switched path runs through",
            where=f"setting 'teacher', here and of the step that writes {config.cache}",
            expected=dump.teacher,
            found=config.teacher,
            fix="name the same teacher in both steps, or in `defaults`",
        )


def _require_same_quantization(config: TrainConfig, dump: DumpConfig, made: _ToBeMade) -> None:
    if not config.switches:
        return
    device = default_device()
    theirs, ours = (
        made.model(name).quantization(setting, dtype_of(dtype, device))
        for name, setting, dtype in (
            (dump.teacher, dump.quantization, dump.dtype),
            (str(config.teacher), config.teacher_quantization, config.dtype),
        )
    )
    check_quantization(theirs, ours, str(config.cache), accept=config.teacher_mismatch == "accept")


def _check_coverage(config: TrainConfig, samples: Samples | None, dump: DumpConfig, made: _ToBeMade) -> None:
    """Will a train step find its samples in a cache that is still to be made?"""
    ours = {"on_error": config.on_error, "too_long": length_settings(config, dump)["too_long"]}
    for name in ours if config.missing != "skip" else ():
        stops = "skip" not in (config.on_error, ours[name])
        if getattr(dump, name) == "skip" and (config.missing == "error" or stops):
            then = "not begin without them" if config.missing == "error" else "stop at them"
            raise CachekdError(
                f"the dump may leave samples out, and this step would {then}",
                where=f"settings 'missing', and {name!r} of the step that writes {config.cache}",
                expected="missing: skip, or missing: ce-only" + " with on_error: skip" * stops,
                found=f"missing: {config.missing}, on_error: {config.on_error}; and {name}: skip there",
                fix="missing: skip leaves the same samples out; it has no effect if the dump left none out",
            )
    others = {name: (getattr(dump, name), getattr(config, name)) for name in DECIDING}
    others = {name: (theirs, mine) for name, (theirs, mine) in others.items() if theirs != mine}
    dumped = made.here(dump) if config.missing == "error" and samples is not None and others else None
    if samples is None or dumped is None:
        return
    there = set(dumped.keys)
    if lacking := [key for key in samples.keys if key not in there]:
        differing = (f"{name} is {theirs} there and {mine} here" for name, (theirs, mine) in others.items())
        raise CachekdError(
            "the cache will lack samples of the data set",
            where=f"{config.data} and {config.cache}",
            expected="samples that the step above dumps",
            found=f"{len(lacking):,} others of {len(samples):,}, the first is {lacking[0]!r}; "
            + ", ".join(differing),
            fix="missing: skip leaves them out, missing: ce-only trains them by L_CE alone; or say the "
            "same of these data as in the dump step",
        )


def _check_eval(config: EvalConfig, made: _ToBeMade) -> None:
    teacher = config.teacher and made.source(config.teacher)
    models = list(dict.fromkeys(map(made.source, config.models)))
    config = config.model_copy(update={"teacher": teacher, "models": models})
    if config.asks_benchmarks:
        require_benchmarks(config)
    opened = open_models(config, made.files)
    if config.cache is None:
        return
    samples = made.here(config)
    if config.cache not in made.dumps and not is_address(config.cache):
        open_asked_cache(config, samples, opened.values())
    if config.history == "none" and samples is not None:
        require_single_questions(samples)


def _check_report(config: ReportConfig, made: _ToBeMade) -> None:
    for run in (config.run, *config.baselines):
        if run not in made.students and not (Path(run) / RUN_FILE).is_file():
            raise CachekdError(
                "this is not a run", where=run, expected=f"a train step above, or a folder with {RUN_FILE}"
            )


_CHECKS: dict[str, Callable[[Any, _ToBeMade], None]] = {
    "dump": _check_dump,
    "train": _check_train,
    "eval": _check_eval,
    "report": _check_report,
}
