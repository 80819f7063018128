"""What the steps of a pipeline may say, and the defaults that they share: the settings of their commands."""

from __future__ import annotations

import re
from copy import copy
from typing import Any, Literal

from pydantic import Field, create_model, field_validator

from cachekd.config import Config, DataOptions, DumpConfig, EvalConfig, ReportConfig, TrainConfig
from cachekd.config.fields import Dtype
from cachekd.paths import PathOrName

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


class Step(Config):
    """What every step has."""

    name: str = Field(description="its folder in the pipeline's, and what other steps call it")

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("a name is made of letters, digits, - and _")
        return value


def _said(model: type[Config], base: type[Config], *own: str) -> Any:
    """The settings of `model`, none of them required, all but those that are `own` to the pipeline.

    No checks between settings come along: those are for the whole, defaults included.
    """
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name in own:
            continue
        field = copy(field)
        if field.is_required():
            field.default = None
        fields[name] = (field.annotation, field)
    return create_model(f"{model.__name__}Said", __base__=base, **fields)


_Dump: Any = _said(DumpConfig, Step, "out", "rank", "world_size")
_Train: Any = _said(TrainConfig, Step, "out")
_TrainDefaults: Any = _said(TrainConfig, Config, "out", "teacher", "student", *DataOptions.model_fields)
_DataDefaults: Any = _said(DataOptions, Config)
_Eval: Any = _said(EvalConfig, Step, "out")
_Report: Any = _said(ReportConfig, Step, "out")


class DumpStep(_Dump):
    """Stage one, `cachekd dump`."""

    step: Literal["dump"]


class TrainStep(_Train):
    """Stage two, `cachekd train`."""

    step: Literal["train"]
    student: PathOrName | None = Field(
        None,
        description="a step, a model folder or hub name; by default the train step above, else `defaults`'",
    )
    cache: PathOrName | None = Field(None, description="a step or a folder; by default the dump step above")
    eval_cache: PathOrName | None = Field(None, description="a dump step above, or a folder: of eval_data")


class EvalStep(_Eval):
    """`cachekd eval`."""

    step: Literal["eval"]
    cache: PathOrName | None = Field(None, description="a dump step, of these data, or a folder")


class ReportStep(_Report):
    """`cachekd report`."""

    step: Literal["report"]


STEPS: dict[str, type[Step]] = {
    "dump": DumpStep,
    "train": TrainStep,
    "eval": EvalStep,
    "report": ReportStep,
}


class TrainDefaults(_TrainDefaults):
    """Any settings of all train steps."""


class Defaults(_DataDefaults):
    """What steps share. A step's own setting, or its stage, comes before these.

    Data and what is said of them are of dump and train steps. A step that names other data, as eval steps do,
    shares how records are read and what is done with bad and long ones, not `image_root`, `limit` and
    `shuffle_seed`.
    """

    teacher: PathOrName | None = Field(None, description="of dump, train and eval steps")
    student: PathOrName | None = Field(None, description="of the first train step")
    dtype: Dtype | None = Field(None, description="of dump and train steps")
    workers: int | None = Field(None, ge=0, description="of dump and train steps")
    train: TrainDefaults | None = Field(None, description="any other setting of all train steps")
