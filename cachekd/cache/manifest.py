"""The manifest: where a cache's logits come from, how they are coded, and which shards hold them.

Nothing that is said here has to be said again: training reads window, codec and vocabulary from the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator

from cachekd.cache.layout import SHARD_FOLDER, SKIPPED_FILE, require_manifest
from cachekd.cache.quantization import QuantizationInfo
from cachekd.cache.sealed import Count, Part, Positive, Sealed, as_tuple, cannot_be_read, read_json
from cachekd.cache.source import Source, require_spans
from cachekd.config.fields import EXACT, KEPT, LATER
from cachekd.errors import CachekdError

FORMAT_VERSION = 1
MOST_TOKENS = 2**21  # ids of a byte table; of the usual vocabularies the largest has 2**18


def _whole(value: Any) -> Any:
    """Take integers alone: a Literal takes whatever compares equal."""
    if type(value) is not int:
        raise ValueError(f"{value!r} is not an integer")
    return value


class TeacherInfo(Part):
    """The model whose logits these are."""

    name: str = Field(description="folder or hub name it was loaded from")
    model_type: str = Field(description="transformers' model_type")
    dtype: str = Field(description="of its weights while it ran")
    vocab_size: int = Field(gt=0, lt=2**31, description="ids 0 to vocab_size - 1 share the probability mass")
    weights_sha256: str = Field(description="over the weight files in order, or hub:commit")
    config_sha256: str = Field(description="over its configuration")
    quantization: Annotated[QuantizationInfo | None, LATER] = Field(
        None, description="null: the weights were not quantised"
    )


class Fingerprints(Part):
    """What turned samples into the teacher's inputs; sha256 each."""

    tokenizer: str
    chat_template: str
    image_processor: str
    image_token: str = Field(description="the placeholder's text")
    encoding: Annotated[str | None, LATER] = Field(
        None, description="over the token ids and the supervised mask of a fixed text; null: not known"
    )
    image_reading: Annotated[Positive | None, LATER] = Field(
        None, description="not a hash: the version of how images are read into pixels; null: not known"
    )


class CodecSettings(Part):
    """How a token's distribution is kept."""

    top_k: int = Field(ge=2, le=KEPT, description="most logprobs per token")
    top_p: float = Field(ge=0, lt=1, description="share of the mass to reach if top_k allows")
    window: int = Field(ge=2, le=EXACT, description="Kneedle saw this many of the largest logits")
    min_k: int = Field(ge=2, le=EXACT, description="least logprobs per token")
    logprob_step: float = Field(1 / 16, gt=0, le=16, description="nats per quantisation step")
    tail: str = Field(
        "none", description="of what is not kept: none (spread evenly), or the tail sketch's setting"
    )


class SketchInfo(Part):
    """sketch.zarr.zip: what tokens share of the tail sketch."""

    name: str = Field("sketch.zarr.zip", pattern=r"^sketch(-[0-9]+)?\.zarr\.zip$")
    axes: Positive = Field(description="C, coordinates per token")
    step: float = Field(gt=0, allow_inf_nan=False, description="nats per step of the codes")
    calibration_tokens: Positive = Field(description="answer tokens that it was fitted on")
    bytes: Positive
    sha256: str


class VocabularyInfo(Part):
    """vocabulary.zarr.zip: the bytes that each of the teacher's token ids stands for."""

    name: Literal["vocabulary.zarr.zip"] = "vocabulary.zarr.zip"
    tokens: int = Field(gt=0, le=MOST_TOKENS, description="ids 0 to tokens - 1 are in it")
    bytes: Positive
    sha256: str


class Fidelity(Part):
    """The cache, read back, against the live teacher at a sample of its answer tokens."""

    tokens: Positive
    kl: float = Field(allow_inf_nan=False, description="KL(live || rebuilt), nats; mean")
    max_error: float = Field(ge=0, allow_inf_nan=False, description="nats, the largest at an id that is kept")
    cosine: float = Field(
        allow_inf_nan=False,
        description="of DBiLD's gradients for a perturbed student, live and cached; mean",
    )

    @classmethod
    def of_all(cls, parts: Iterable[Fidelity | None]) -> Fidelity | None:
        """Join what was measured at different tokens, by their numbers; None where nothing was."""
        measured = [part for part in parts if part is not None]
        if not measured:
            return None
        tokens = sum(part.tokens for part in measured)
        return cls(
            tokens=tokens,
            kl=round(sum(part.kl * part.tokens for part in measured) / tokens, 6),
            max_error=max(part.max_error for part in measured),
            cosine=round(sum(part.cosine * part.tokens for part in measured) / tokens, 6),
        )


class ShardInfo(Part):
    """One file under shards/."""

    name: str = Field(pattern=r"^[0-9]{5,9}\.zarr\.zip$")
    source: int = Field(0, ge=0, description="index in `sources`")
    sketch: int | None = Field(None, ge=0, description="index in `sketches`; null without a tail sketch")
    span: Annotated[tuple[Count, Count] | None, BeforeValidator(as_tuple)] = Field(
        None, description="of the source's data set, first and last + 1; null where shards were cut"
    )
    samples: Positive
    without_image: Annotated[Count | None, LATER] = Field(
        None, description="samples of text alone; null: not known"
    )
    cut: Annotated[Count | None, LATER] = Field(
        0, description="samples whose answers lack the end, as they were too long; null: not known"
    )
    halved: Annotated[Count, LATER] = Field(
        0, description="times that batches became half as large, as memory ran out while it was made"
    )
    tokens: Count
    entries: Count = Field(description="logprobs stored")
    bytes: Positive
    sha256: str
    samples_sha256: str | None = Field(
        None, description="over keys and content hashes, so that other data are not taken for these"
    )
    fidelity: Fidelity | None = Field(None, description="null where it was not measured")


class SkippedInfo(Part):
    """skipped.jsonl: {"key", "reason"} for each sample that was left out."""

    samples: Positive
    bytes: Positive
    sha256: str


class ListedFile(NamedTuple):
    """A file that a manifest lists.

    Attributes:
        name: its path in the cache.
        bytes, sha256: of its content.
    """

    name: str
    bytes: int
    sha256: str


class Derivation(Part):
    """A step by which a cache was made of others, without a teacher."""

    operation: Literal["select", "merge", "recompress"]
    version: str = Field(description="of the cachekd that did it")
    parents: Annotated[list[str], FailFast()] = Field(
        min_length=1, description="sha256 in the manifests that it was made from"
    )
    parent_samples: Positive = Field(description="in all of them")
    parent_codec: CodecSettings = Field(description="of all of them")
    fidelity: Fidelity | None = Field(
        None, description="against the parents' rebuilt logprobs; null where every value is as it was"
    )
    result: str | None = Field(
        None, description="sha256 in the manifest that it made; null in the last step: this manifest"
    )


class Header(Sealed):
    """What all of a cache's logits have in common."""

    format_version: Annotated[Literal[1], BeforeValidator(_whole)] = 1
    teacher: TeacherInfo
    fingerprints: Fingerprints
    codec: CodecSettings
    vocabulary: Annotated[VocabularyInfo | None, LATER] = Field(
        None, description="null: what the ids stand for is not in the cache"
    )

    @model_validator(mode="after")
    def _names_every_id(self) -> Self:
        if self.vocabulary is not None and self.vocabulary.tokens < self.teacher.vocab_size:
            raise ValueError(
                f"vocabulary has {self.vocabulary.tokens:,} tokens of {self.teacher.vocab_size:,}"
            )
        return self


class Manifest(Header):
    """manifest.json, written last: a shard that it does not list does not exist."""

    sources: Annotated[list[Source], FailFast()] = Field(min_length=1)
    sketches: Annotated[list[SketchInfo], FailFast()] = Field(
        description="empty without a tail sketch; several in a merged cache"
    )
    fidelity: Fidelity | None = Field(None, description="of all shards; null where it was not measured")
    skipped: SkippedInfo | None = Field(None, description="null where no sample was left out")
    lineage: Annotated[list[Derivation], LATER, FailFast()] = Field(
        [], description="parents' steps first; not there in a dump's own cache"
    )
    shards: Annotated[list[ShardInfo], FailFast()] = Field(min_length=1)

    @model_validator(mode="after")
    def _refers_to_what_is_there(self) -> Self:
        for shard in self.shards:
            if shard.source >= len(self.sources):
                raise ValueError(f"shard {shard.name} is of source {shard.source}, which is not listed")
            if shard.sketch not in (range(len(self.sketches)) if self.sketches else (None,)):
                raise ValueError(f"shard {shard.name} has sketch {shard.sketch}, which is not listed")
            require_counts(shard, self.codec.top_k, self.teacher.vocab_size)
        for names in ([shard.name for shard in self.shards], [sketch.name for sketch in self.sketches]):
            if len(names) != len(set(names)):
                raise ValueError("a file is listed twice")
        if bool(self.sketches) != (self.codec.tail != "none"):
            raise ValueError(f"the tail is {self.codec.tail!r}, with {len(self.sketches)} sketches")
        spans: list[list[tuple[int, int]]] = [[] for _ in self.sources]
        for shard in self.shards:
            if shard.span is not None:
                spans[shard.source].append(shard.span)
        for source, found in zip(self.sources, spans, strict=True):
            require_spans(source, sorted(found))
        return self

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def entries(self) -> int:
        return sum(shard.entries for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of the shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def sketch_bytes(self) -> int:
        """Bytes of the tail sketches."""
        return sum(sketch.bytes for sketch in self.sketches)

    @property
    def vocabulary_bytes(self) -> int:
        """Bytes of the vocabulary's file; 0 where there is none."""
        return 0 if self.vocabulary is None else self.vocabulary.bytes

    @property
    def files(self) -> list[ListedFile]:
        """All that a reader needs beside the manifest: shards, tail sketches, vocabulary, skipped.jsonl.

        A finished dump's plan and records are no part of it. Names cannot lead out of a folder.
        """
        found = [ListedFile(f"{SHARD_FOLDER}/{info.name}", info.bytes, info.sha256) for info in self.shards]
        found += [ListedFile(info.name, info.bytes, info.sha256) for info in self.sketches]
        if (table := self.vocabulary) is not None:
            found.append(ListedFile(table.name, table.bytes, table.sha256))
        if self.skipped is not None:
            found.append(ListedFile(SKIPPED_FILE, self.skipped.bytes, self.skipped.sha256))
        return found

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read a cache's manifest.

        Raises:
            CachekdError: there is none, or it cannot be read by this version.
        """
        path = require_manifest(Path(folder))
        values = read_json(path)
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CachekdError(
                "the cache was written by a newer cachekd",
                where=str(path),
                expected=f"format_version up to {FORMAT_VERSION}",
                found=version,
                fix="pip install --upgrade cachekd",
            )
        if version != FORMAT_VERSION:
            raise cannot_be_read(path, f"format_version {version!r}")
        return cls.parse(path, values)


def require_counts(shard: ShardInfo, top_k: int, vocab_size: int) -> None:
    """Refuse what no shard can hold: every sample has a token, every token an entry.

    Raises:
        ValueError: counts that contradict each other.
    """
    samples, tokens, entries = shard.samples, shard.tokens, shard.entries
    if not samples <= tokens <= entries <= tokens * min(top_k, vocab_size):
        raise ValueError(
            f"shard {shard.name} has {samples:,} samples, {tokens:,} tokens, {entries:,} entries"
        )
    if max(shard.without_image or 0, shard.cut or 0) > samples:
        raise ValueError(f"shard {shard.name} has more samples cut or without images than samples")
    if shard.fidelity is not None and shard.fidelity.tokens > tokens:
        raise ValueError(f"shard {shard.name} was measured at more tokens than it has")
    if shard.span is not None and samples > shard.span[1] - shard.span[0]:
        raise ValueError(f"shard {shard.name} has {samples:,} samples of the span {shard.span}")
