"""The settings of stage one."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ByteSize, Field, ValidationInfo, field_validator

from cachekd.config.data import DataOptions
from cachekd.config.fields import (
    CALIBRATION_TOKENS,
    DEFAULT_TAIL,
    EXACT,
    KEPT,
    LATER,
    TAIL_FORMS,
    Dtype,
    ModelName,
    Tail,
    Workers,
    require_room_for_each,
)
from cachekd.config.loading import LoadOptions
from cachekd.paths import LocalPath


class DumpConfig(LoadOptions, DataOptions):
    """Stage one, `cachekd dump`."""

    # As `cachekd.dump.plan.same_plan` has it.
    FREE: ClassVar = frozenset({"out", "workers", "rank", "world_size", "on_error"}) | {
        "batch_tokens",
        "batch_size",
        "on_oom",
        "device_map",
        "max_memory",
    }

    teacher: ModelName
    out: LocalPath = Field(description="the cache's folder: new, empty, or that of a dump to continue")
    top_k: int = Field(128, ge=2, le=KEPT, description="the most logprobs kept per answer token")
    top_p: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="keep at least this share of the probability; by default 0.99 if tail is none, else 0",
    )
    tail: Tail = Field(
        DEFAULT_TAIL,
        description="how precisely the logprobs outside the top-k are rebuilt: "
        f"{', '.join(TAIL_FORMS.values())}",
    )
    disk_budget: ByteSize | None = Field(
        None,
        gt=0,
        le=EXACT,
        description="the size of the whole cache, such as 50GB; it chooses top_k and tail",
    )
    calibration_tokens: int = Field(
        CALIBRATION_TOKENS, ge=1, description="answer tokens of the pilot, to which the tail sketch is fitted"
    )
    window: int = Field(128, ge=2, description="Kneedle looks at this many of the largest logits")
    min_k: int = Field(2, ge=2, description="the least logprobs kept per answer token")
    shard_samples: int | None = Field(
        None, ge=1, description="samples per shard; by default as many as have some 65,000 answer tokens"
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="the most padded tokens per teacher forward: samples times the longest of them. Without "
        "this and batch_size: those of the 16 longest samples, halved until they fit the memory",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="samples per teacher forward, whatever their length; together with batch_tokens, the "
        "most",
    )
    on_oom: Literal["stop", "halve"] = Field(
        "stop",
        description="if memory runs out in the middle: stop, or halve the batches for the rest of the shard",
    )
    workers: Workers = 0
    dtype: Dtype = Field(
        "auto", description="the teacher's precision; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    float32_head: Annotated[bool, LATER] = Field(
        False,
        description="apply the head of a half-precision teacher in float32. Logits are finer, and the head "
        "runs twice",
    )
    rank: int = Field(0, ge=0, description="the number of this process among those that share the work")
    world_size: int = Field(1, ge=1, description="how many processes share the work")

    _batch_fits = field_validator("batch_size")(require_room_for_each)

    @field_validator("world_size")
    @classmethod
    def _has_the_rank(cls, value: int, info: ValidationInfo) -> int:
        if value <= info.data.get("rank", 0):
            raise ValueError(f"too small for rank {info.data['rank']}: ranks count from 0")
        return value

    @field_validator("min_k")
    @classmethod
    def _fits_the_window(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("window", value):
            raise ValueError(f"larger than the window, {info.data['window']}")
        return value
