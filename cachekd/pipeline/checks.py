"""What can be known of the steps before the first of them begins, so that it is not found out in ten hours.

No weights are read: settings, configurations, processors, and whether data and caches are there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from fsspec.core import url_to_fs

from cachekd.bind import Binding
from cachekd.cache.manifest import Fingerprints, Manifest
from cachekd.cache.tail import TailSetting
from cachekd.config import DumpConfig, EvalConfig, TrainConfig
from cachekd.data_options import DataOptions
from cachekd.dump_plan import require_vocabulary
from cachekd.errors import CachekdError, about
from cachekd.evaluation.questions import require_single_questions
from cachekd.files import RUN_FILE
from cachekd.lean import check_lean_settings
from cachekd.paths import is_address, is_hub_data, split_query
from cachekd.pipeline.config import ReportConfig
from cachekd.pipeline.coverage import check_coverage, check_pictures, on_this_disk
from cachekd.pipeline.plan import PlannedStep, in_step
from cachekd.run_folder import CHECKPOINTS
from cachekd.samples import open_samples
from cachekd.samples.map_function import load_map
from cachekd.samples.tar_urls import find_tars, is_remote, is_tar, named_errors
from cachekd.training_arguments import SwitchKDTrainingArguments
from cachekd.vlm import ModelFiles, check_switch, check_tokenizers, plan_bridge


def check_steps(steps: list[PlannedStep], names: set[str]) -> None:
    """Refuse now what a step would be refused for when its turn comes.

    Args:
        steps: all of the pipeline.
        names: of those that are to run.

    Raises:
        CachekdError: the first that is wrong; the step is named.
    """
    models = _Models(steps, names)
    for step in steps:
        if step.name not in names:
            continue
        try:
            _CHECKS[step.kind](step.config, models)
            if step.data is not None:
                _check_data(step.data)
            for setting, data in step.other_data.items():
                with about(setting):
                    _check_data(data)
        except CachekdError as error:
            raise in_step(step.name, error) from None


# Of a model and of a cache's teacher.
_FACTS = ("tokenizer", "chat template", "encoding of text")


class _Models:
    """Configurations and processors, each read once. What a train step will make has those of its student.

    Attributes:
        students: of train steps, by the folder of the run.
        teachers: of dump steps, by the folder of the cache.
        dumps: those of them that are to run, likewise.
    """

    def __init__(self, steps: list[PlannedStep], names: set[str]) -> None:
        self.students = {str(step.out): step.config.student for step in steps if step.kind == "train"}
        self.teachers = {str(step.out): step.config.teacher for step in steps if step.kind == "dump"}
        self.dumps = {
            str(step.out): step.config for step in steps if step.kind == "dump" and step.name in names
        }
        self._opened: dict[str, ModelFiles] = {}

    def source(self, name: str) -> str:
        """The model, which is there, that this one begins from."""
        while name in self.students:
            name = self.students[name]
        return name

    def files(self, name: str) -> ModelFiles:
        """Of that model, opened once for all steps."""
        source = self.source(name)
        return self._opened.setdefault(source, ModelFiles(source))

    def reader(self, name: str) -> ModelFiles:
        """The same, of a model that reads samples by itself.

        Raises:
            CachekdError: its processor cannot be used for that.
        """
        files = self.files(name)
        _ = files.encoder
        return files


def _check_dump(config: DumpConfig, models: _Models) -> None:
    TailSetting.parse(config.tail)
    require_vocabulary(config, models.reader(config.teacher))


def _check_train(config: TrainConfig, models: _Models) -> None:
    SwitchKDTrainingArguments.of(config, config.out / CHECKPOINTS)
    check_lean_settings(config)
    if config.binding is not None:
        Binding.read(config.binding)
    student = models.reader(config.student)
    if config.cache is not None:
        _check_cache(config.cache, student, models)
    if config.runs_teacher:
        _check_teacher(config, models)
    check_pictures(config)
    check_coverage(config, models.dumps)
    if (held_out := config.on_held_out()) is not None:
        with about("eval_cache"):
            if held_out.cache is not None:
                _check_cache(held_out.cache, student, models)
            check_coverage(held_out, models.dumps)


def _check_cache(cache: str, student: ModelFiles, models: _Models, facts: tuple[str, ...] = _FACTS) -> None:
    """A dump above will have its teacher's fingerprints, a cache that is there has its own; one at an address
    is not asked.

    Args:
        student: or another model.
        facts: the first of `_FACTS`, which have to be the same.
    """
    tokenizer = student.processor.tokenizer
    if (name := models.teachers.get(cache)) is not None:
        teacher = models.reader(name)
        check_tokenizers(teacher.processor.tokenizer, tokenizer)
        stored = teacher.fingerprints
    elif is_address(cache):
        return
    else:
        stored = Manifest.load(Path(cache)).fingerprints
    for fact, wanted, found in zip(facts, _of_text(stored), _of_text(student.fingerprints), strict=False):
        if wanted not in (None, found):  # older caches do not know of the last
            raise CachekdError(
                f"the cache's {fact} and the model's are different",
                where=f"{name or cache} and {tokenizer.name_or_path}",
                expected=f"sha256 {wanted}",
                found=f"sha256 {found}",
                fix="give the model the teacher's processor",
            )


def _of_text(prints: Fingerprints) -> tuple[str, str, str | None]:
    return prints.tokenizer, prints.chat_template, prints.encoding


def _check_teacher(config: TrainConfig, models: _Models) -> None:
    teacher, student = models.files(str(config.teacher)), models.files(config.student)
    if config.switch_bridge is not None:
        plan_bridge(teacher.config, student.config)
    elif config.lambda_vsd > 0:
        check_switch(teacher.config, student.config)
    check_tokenizers(teacher.processor.tokenizer, student.processor.tokenizer)


def _check_eval(config: EvalConfig, models: _Models) -> None:
    names = [*([config.teacher] if config.teacher else []), *config.models]
    first, *others = map(models.reader, names)
    for other in others:
        check_tokenizers(first.processor.tokenizer, other.processor.tokenizer)
    if config.cache is None:
        return
    _check_cache(config.cache, first, models, facts=("tokenizer",))
    if config.history == "none" and on_this_disk(config):
        require_single_questions(open_samples(config))


def _check_report(config: ReportConfig, models: _Models) -> None:
    for run in (config.run, *config.baselines):
        if run not in models.students and not (Path(run) / RUN_FILE).is_file():
            raise CachekdError(
                "this is not a run", where=run, expected=f"a train step above, or a folder with {RUN_FILE}"
            )


_CHECKS: dict[str, Callable[[Any, _Models], None]] = {
    "dump": _check_dump,
    "train": _check_train,
    "eval": _check_eval,
    "report": _check_report,
}


def _check_data(data: DataOptions) -> None:
    """Data on this disk were opened already, to be compared; of others, whether they are there."""
    spec = data.data
    if data.map is not None:
        load_map(data.map)
    if is_remote(spec):
        first = find_tars(spec if is_tar(spec) else spec.rstrip("/") + "/*.tar")[0]
        with named_errors(first, "the data cannot be reached"):
            fs, path = url_to_fs(first)
            fs.info(path)
    elif is_hub_data(spec):
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            open_samples(data)  # what was downloaded before
        else:
            _require_on_hub(spec)


def _require_on_hub(spec: str) -> None:
    from cachekd.samples.hf_load import HfSpec, require_on_hub  # importing `datasets` takes seconds

    require_on_hub(HfSpec.parse(*split_query(spec)))
