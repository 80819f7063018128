"""Where a cache's logits come from: the data as they were read, and how a dump cut them up."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, FailFast, Field

from cachekd.cache.sealed import Count, Part, Positive, as_tuple
from cachekd.config.fields import LATER, TooLong


class DataInfo(Part):
    """A data set as it was read."""

    path: str
    samples: Count = Field(description="before bad ones were left out")
    sha256: str = Field(description="over the keys in order; the shards hold a hash of every sample")
    limit: Positive | None = Field(None, description="only so many were taken")
    shuffle_seed: Count | None = Field(None, description="of the order; null: as it stands")
    map: str | None = Field(None, description="module:function that made the records")
    content_sha256: str | None = Field(
        None, description="over the content of up to 32 samples from all over it; null where it is not known"
    )
    key: Annotated[str | None, LATER] = Field(None, description="the field that the keys were taken from")
    image_field: Annotated[tuple[str, ...], LATER, FailFast(), BeforeValidator(as_tuple)] = Field(
        (), description="the fields that pictures were taken from, if not the usual ones"
    )
    max_tokens: Annotated[Positive | None, LATER] = Field(
        None, description="most tokens of a sample, where it was not the teacher's context"
    )
    too_long: Annotated[TooLong, LATER] = Field(
        "error", description="what was done with longer ones; cut: their answers lack the end"
    )
    repeated_keys: Annotated[Count, LATER] = Field(
        0, description="samples that have #2, #3, ... behind their key, which came before; without any limit"
    )
    other_files: Annotated[Count, LATER] = Field(0, description="files that are no data, likewise")


class Geometry(Part):
    """How a dump was cut up; with the same geometry a shard comes out the same, byte for byte."""

    shard_samples: Positive = Field(description="samples of the data set per shard")
    group_samples: Positive = Field(description="samples that were sorted by length together")
    batch_size: Positive = Field(description="samples per teacher forward; with batch_tokens at most so many")
    batch_tokens: Annotated[Positive | None, LATER] = Field(
        None, description="padded tokens per teacher forward, at most; null: any number"
    )
    calibration_tokens: Positive = Field(description="answer tokens that the tail sketch was to be fitted on")
    budget_for: str | None = Field(None, description="the settings that a disk budget began from")
    disk_budget: Count | None = Field(None, description="bytes, from which top_k and tail were chosen")


class Source(Part):
    """One dump. A merged cache has several."""

    data: DataInfo
    geometry: Geometry | None = Field(None, description="null where samples were added one by one")
    versions: dict[str, str] = Field(description="of the libraries that computed the logits")
    attn_implementation: Annotated[str | None, LATER] = Field(
        None, description="the kernels of attention, where they were not transformers' choice"
    )
    float32_head: Annotated[bool, LATER] = Field(
        False, description="whether the head was applied in float32, whatever the teacher's dtype"
    )


def require_spans(source: Source, spans: list[tuple[int, int]]) -> None:
    """Refuse spans that the source's dump cannot have had.

    Args:
        spans: of all its shards, sorted.

    Raises:
        ValueError: they overlap, run backwards, lead beyond the data set, or are not as it was cut up.
    """
    if spans and source.geometry is None:
        raise ValueError(f"shards have spans, such as {spans[0]}, of samples that were added one by one")
    before = 0
    for first, last in spans:
        if not before <= first < last <= source.data.samples:
            raise ValueError(f"the span {(first, last)} overlaps, runs backwards or leads beyond the samples")
        size = 0 if source.geometry is None else source.geometry.shard_samples
        if first % size or last - first > size:
            raise ValueError(f"the span {(first, last)} is not of shards of {size:,} samples")
        before = last
