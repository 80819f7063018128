"""The settings of an evaluation."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from cachekd.config.data import DataOptions, NamedData
from cachekd.config.fields import Dtype, History, Workers, require_room_for_each
from cachekd.config.loading import LoadOptions
from cachekd.errors import CachekdError
from cachekd.paths import LocalPath, PathOrName


class EvalConfig(LoadOptions, DataOptions):
    """Exact match, and agreement with the teacher, on held-out data.

    Raises:
        CachekdError: there are both a teacher and a cache of it.
    """

    FREE: ClassVar = frozenset({"out", "batch_tokens", "batch_size", "workers", "device_map", "max_memory"})

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

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.teacher is not None and self.cache is not None:
            raise CachekdError(
                "a cache takes the place of the teacher",
                where="settings 'teacher' and 'cache'",
                fix="leave one of them out: the teacher has a row of its own, a cache costs nothing",
            )
        return self
