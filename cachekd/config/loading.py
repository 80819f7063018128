"""How a model's weights come into memory, besides their dtype: the same in every command that loads one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cachekd.config.base import Config
from cachekd.config.fields import Quantization


class LoadOptions(Config):
    """How the teacher's weights are loaded."""

    quantization: Quantization = Field(
        None,
        description="of the teacher's weights while they are loaded, head and vision encoder excepted; or a "
        "mapping of a backend's own settings, {quant_method: ..., ...}",
    )

    @property
    def load_settings(self) -> Any:
        """What `cachekd.models.loading.LoadSettings` has, as these options say it."""
        return {"quantization": self.quantization}


class TeacherLoadOptions(Config):
    """The same of a teacher that runs in training, and what else is quantised there."""

    teacher_quantization: Quantization = Field(
        None,
        description="of the teacher's weights while they are loaded, head excepted; or a mapping of a "
        "backend's own settings, {quant_method: ..., ...}",
    )
    teacher_mismatch: Literal["error", "accept"] = Field(
        "error",
        description="a cache of a quantised teacher, where the teacher that runs is quantised otherwise or "
        "not at all, is refused or accepted",
    )
    student_quantization: Quantization = Field(
        None, description="the same for the student; with `lora` this is QLoRA"
    )

    @property
    def teacher_load_settings(self) -> Any:
        """What `cachekd.models.loading.LoadSettings` has, as these options say it of the teacher."""
        return {"quantization": self.teacher_quantization}
