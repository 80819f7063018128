"""What a manifest says of quantised weights."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from cachekd.cache.sealed import Part
from cachekd.config.fields import LATER


class QuantizationInfo(Part):
    """How weights were quantised."""

    backend: str = Field(description="transformers' quant_method")
    version: str = Field(description="of the backend's package")
    settings: dict[str, Any] = Field(
        description="of transformers' config for it, defaults included; the dtype of 4-bit products is left "
        "out where it is the model's"
    )
    in_checkpoint: Annotated[bool, LATER] = Field(
        False, description="the checkpoint was saved so; else it was quantised while it was loaded"
    )

    @property
    def setting(self) -> dict[str, Any] | None:
        """The setting by which a model is loaded so again; None where its checkpoint says it."""
        return None if self.in_checkpoint else {"quant_method": self.backend, **self.settings}

    def same_weights(self, other: QuantizationInfo | None) -> bool:
        """Whether both make the same weights of the same ones, as far as settings tell."""
        return other is not None and (self.backend, self.settings) == (other.backend, other.settings)

    @property
    def computes_in(self) -> str | None:
        """The dtype of its products, where that is not the model's. bitsandbytes' 8-bit ones round states to
        float16 and by what else is in the batch."""
        return "float16" if self.settings.get("load_in_8bit") else None

    def __str__(self) -> str:
        settings = ", ".join(f"{name}: {value}" for name, value in sorted(self.settings.items()))
        return f"{self.backend} ({settings})"
