"""The settings of an evaluation."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cachekd.config.data import DataOptions, NamedData
from cachekd.config.fields import LATER, Dtype, History, Workers, require_room_for_each
from cachekd.config.loading import LoadOptions
from cachekd.errors import CachekdError
from cachekd.paths import LocalPath, PathOrName, expanded

Suite = Literal["switch-kd"]
# What says nothing where public benchmarks are asked: they have data and a reading of their own.
OF_OWN_DATA = frozenset(DataOptions.model_fields) - {"limit", "max_tokens", "on_error"} | {
    "cache",
    "history",
    "blind",
    "prior_data",
    "workers",
}
OF_BENCHMARKS = frozenset({"tasks_dir", "benchmark_data"})


def _names(value: Any) -> Any:
    """Split names, as in "pope,gqa"; a list may hold such texts too."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    return tuple(name.strip() for text in texts for name in text.split(","))


def _named_folder(value: Any) -> Any:
    """Expand the path in "pope=~/data/pope"."""
    if not isinstance(value, str) or not re.fullmatch(r"[^=]+=.+", value):
        raise ValueError("a name and a folder are needed, NAME=FOLDER, as in pope=data/pope")
    name, _, folder = value.partition("=")
    return f"{name.strip()}={expanded(folder)}"


class EvalConfig(LoadOptions, DataOptions):
    """Exact match, and agreement with the teacher, on held-out data; or scores on public benchmarks.

    Raises:
        CachekdError: there are both data and benchmarks, or neither; a setting is of the other kind; or there
            are both a teacher and a cache of it.
    """

    FREE: ClassVar = frozenset({"out", "batch_tokens", "batch_size", "workers", "device_map", "max_memory"})

    data: PathOrName | None = Field(  # type: ignore[assignment]  # None where benchmarks are asked
        None, description=f"questions with answers: {DataOptions.model_fields['data'].description}"
    )
    limit: int | None = Field(
        None, ge=1, description="only the first so many samples; of each benchmark, only so many questions"
    )
    benchmarks: Annotated[tuple[str, ...], LATER, BeforeValidator(_names)] = Field(
        (),
        description="in place of data, public benchmarks by the names of lmms-eval's tasks, such as "
        "pope,gqa,textvqa_val; needs an environment of its own (docs/how-to/benchmarks.md)",
    )
    suite: Annotated[Suite | None, LATER] = Field(
        None, description="the ten benchmarks of the Switch-KD paper, with its figures beside the scores"
    )
    tasks_dir: Annotated[LocalPath | None, LATER] = Field(
        None, description="a folder with more tasks for lmms-eval: YAML files, and Python beside them"
    )
    benchmark_data: Annotated[tuple[Annotated[str, BeforeValidator(_named_folder)], ...], LATER] = Field(
        (),
        description="NAME=FOLDER: a benchmark's data from a `datasets` folder, not from the hub; again for "
        "several",
    )
    models: list[PathOrName] = Field(
        min_length=1,
        description="model or run folders, asked the same; in a pipeline, by default all train steps above",
    )
    out: LocalPath | None = Field(None, description="a folder for scores.json, all rows")
    teacher: PathOrName | None = Field(
        None, description="adds its own row, and every model's agreement with it"
    )
    cache: PathOrName | None = Field(
        None, description="the teacher's logits of these data, for the agreement alone: it need not run"
    )
    history: History = Field(
        "none",
        description="what stands before a question: none of its conversation, or all of it, true answers "
        "included",
    )
    blind: bool = Field(
        True, description="ask every model again with each picture replaced by its mean colour"
    )
    prior_data: NamedData | None = Field(
        None,
        description="the training data, a name or a mapping of data options: adds the row of what "
        "is answered most often there",
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="padded tokens per forward, at most; halved when memory runs out. Without this and "
        "batch_size: those of the 32 longest questions of the first 256",
    )
    batch_size: int | None = Field(
        None, ge=1, description="questions per forward, whatever their length; beside batch_tokens, at most"
    )
    workers: Workers = 0
    dtype: Dtype = Field("auto", description="the models'; auto: bfloat16 on a GPU, float32 on a CPU")

    _batch_fits = field_validator("batch_size")(require_room_for_each)

    @field_validator("models")
    @classmethod
    def _are_different(cls, value: list[str]) -> list[str]:
        models = [model.rstrip("/") or model for model in value]
        if twice := next((model for model in models if models.count(model) > 1), None):
            raise ValueError(f"{twice} is named twice")
        return models

    @property
    def asks_benchmarks(self) -> bool:
        """Whether public benchmarks are asked, not data of one's own."""
        return bool(self.benchmarks) or self.suite is not None

    @property
    def folders(self) -> dict[str, str]:
        """Where the data of benchmarks are, by their names."""
        return dict(one.split("=", 1) for one in self.benchmark_data)

    @model_validator(mode="after")
    def _either_data_or_benchmarks(self) -> Self:
        if not self.asks_benchmarks and self.data is None:
            raise CachekdError(
                "it is not said what the models are asked",
                where="settings 'data' and 'benchmarks'",
                fix="--data names questions of your own, --benchmarks or --suite public ones",
            )
        other = OF_OWN_DATA if self.asks_benchmarks else OF_BENCHMARKS
        fields = type(self).model_fields
        wrong = [
            name
            for name in fields
            if name in other & self.model_fields_set and getattr(self, name) != fields[name].get_default()
        ]
        if wrong:
            public = "public benchmarks, which have their own data and prompts"
            raise CachekdError(
                f"{', '.join(wrong)}: not for {public if self.asks_benchmarks else 'data of your own'}",
                where=f"setting {wrong[0]!r}",
                fix="leave it out; one command asks data, another one benchmarks",
            )
        return self

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.teacher is not None and self.cache is not None:
            raise CachekdError(
                "a cache takes the place of the teacher",
                where="settings 'teacher' and 'cache'",
                fix="leave one of them out: the teacher has a row of its own, a cache costs nothing",
            )
        return self
