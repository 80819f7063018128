"""The settings of a training step's batches."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cachekd.config.base import Config
from cachekd.config.fields import LATER, require_room_for_each

SAMPLES = 16  # of a batch, where nothing is said


class BatchOptions(Config):
    """How many samples, or tokens, an optimizer step has."""

    batch_tokens: Annotated[int | None, LATER] = Field(
        None,
        ge=1,
        description="the most padded tokens per device and step, by estimated lengths; samples of similar "
        "length share a step",
    )
    batch_size: int | None = Field(
        SAMPLES,
        ge=1,
        description="samples per device and step; together with batch_tokens, the most",
    )
    gradient_accumulation: int = Field(1, ge=1, description="steps whose gradients are added up")

    _batch_fits = field_validator("batch_size")(require_room_for_each)

    @model_validator(mode="before")
    @classmethod
    def _one_default(cls, values: Any) -> Any:
        """Count tokens or samples, if not both."""
        if not isinstance(values, dict):
            return values
        by_tokens = values.get("batch_tokens") is not None
        return {"batch_size": None, **values} if by_tokens else values

    @field_validator("batch_size")
    @classmethod
    def _by_default(cls, value: int | None, info: ValidationInfo) -> int | None:
        return SAMPLES if value is None and info.data.get("batch_tokens") is None else value

    @property
    def most_samples(self) -> int:
        """Samples that a batch has at most: never more than tokens."""
        most = self.batch_size or self.batch_tokens
        assert most is not None
        return most

    @classmethod
    def comparable(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Replace `batch_size` and `gradient_accumulation` by their product, the samples of an optimizer step
        in each process: a run that ran out of memory may go on with smaller batches.

        With `dataloader_drop_last` both count: how much of an epoch is dropped depends on the batch. So do
        they with `batch_tokens`: which samples a step has depends on each.
        """
        settings = super().comparable(settings)
        sizes = ("batch_size", "gradient_accumulation")
        if settings["training"].get("dataloader_drop_last") or settings.get("batch_tokens") is not None:
            return settings
        others = {name: value for name, value in settings.items() if name not in sizes}
        return others | {" x ".join(sizes): settings[sizes[0]] * settings[sizes[1]]}
