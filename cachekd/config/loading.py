"""How models' weights come into memory."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cachekd.config.base import Config
from cachekd.config.fields import LATER, Attention


class LoadOptions(Config):
    """What `cachekd dump` and `cachekd eval` say of loading a model, besides its dtype."""

    attn_implementation: Attention = None

    @property
    def load_settings(self) -> dict[str, Any]:
        """The same as `cachekd.models.loading.LoadSettings`, which imports torch."""
        return {"attn_implementation": self.attn_implementation}


class TrainLoadOptions(Config):
    """The same of `cachekd train`, for each of the two models."""

    student_dtype: Annotated[Literal["float32", "bfloat16"], LATER] = Field(
        "float32",
        description="of the student's weights and gradients; bfloat16 takes half of the memory, and each "
        "step is rounded at random, so that small ones are not lost. Adapters are in float32 in any case",
    )
    teacher_attn_implementation: Attention = None
    student_attn_implementation: Attention = None
