"""How models' weights come into memory."""

from __future__ import annotations

from typing import Any

from cachekd.config.base import Config
from cachekd.config.fields import Attention


class LoadOptions(Config):
    """What `cachekd dump` and `cachekd eval` say of loading a model, besides its dtype."""

    attn_implementation: Attention = None

    @property
    def load_settings(self) -> dict[str, Any]:
        """The same as `cachekd.models.loading.LoadSettings`, which imports torch."""
        return {"attn_implementation": self.attn_implementation}


class TrainLoadOptions(Config):
    """The same of `cachekd train`, for each of the two models."""

    teacher_attn_implementation: Attention = None
    student_attn_implementation: Attention = None
