"""The manifest: where a cache's logits come from, how they are coded, and which shards hold them.

Nothing that is said here has to be said again: training reads window, codec and vocabulary from the manifest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cachekd.errors import CachekdError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherInfo(_Part):
    """The model whose logits these are."""

    name: str = Field(description="folder or hub name it was loaded from")
    model_type: str = Field(description="transformers' model_type")
    dtype: str = Field(description="of its weights while it ran")
    vocab_size: int = Field(gt=0, description="ids 0 to vocab_size - 1 share the probability mass")
    weights_sha256: str = Field(description="over the weight files in order, or hub:commit")


class Fingerprints(_Part):
    """What turned samples into the teacher's inputs; sha256 each."""

    tokenizer: str
    chat_template: str
    image_processor: str
    image_token: str = Field(description="the placeholder's text")


class DataInfo(_Part):
    """The data set that was dumped."""

    path: str
    samples: int = Field(ge=0)
    sha256: str = Field(description="over the keys in order; the shards hold a hash of every sample")


class CodecSettings(_Part):
    """How a token's distribution is kept."""

    top_k: int = Field(ge=2, le=65535, description="most logprobs per token")
    top_p: float = Field(ge=0, lt=1, description="share of the mass to reach if top_k allows")
    window: int = Field(ge=2, description="Kneedle saw this many of the largest logits")
    min_k: int = Field(ge=2, description="least logprobs per token")
    logprob_step: float = Field(1 / 16, gt=0, description="nats per quantisation step")
    tail: str = Field(
        "none", description="of what is not kept: none (spread evenly), or the tail sketch's setting"
    )


class SketchInfo(_Part):
    """sketch.zarr.zip: what all tokens share of the tail sketch."""

    axes: int = Field(gt=0, description="C, coordinates per token")
    step: float = Field(gt=0, description="nats per step of the codes")
    calibration_tokens: int = Field(gt=0, description="answer tokens that it was fitted on")
    bytes: int = Field(gt=0)
    sha256: str


class Fidelity(_Part):
    """The cache, read back, against the live teacher at a sample of its answer tokens."""

    tokens: int = Field(gt=0)
    kl: float = Field(allow_inf_nan=False, description="KL(live || rebuilt), nats; mean")
    max_error: float = Field(ge=0, allow_inf_nan=False, description="nats, the largest at an id that is kept")
    cosine: float = Field(
        allow_inf_nan=False,
        description="of DBiLD's gradients for a perturbed student, live and cached; mean",
    )


class ShardInfo(_Part):
    """One file under shards/."""

    name: str
    samples: int = Field(gt=0)
    tokens: int = Field(ge=0)
    entries: int = Field(ge=0, description="logprobs stored")
    bytes: int = Field(gt=0)
    sha256: str


class Manifest(_Part):
    """manifest.json, written last: a shard that it does not list does not exist."""

    format_version: Literal[1] = 1
    teacher: TeacherInfo
    fingerprints: Fingerprints
    data: DataInfo
    codec: CodecSettings
    sketch: SketchInfo | None = Field(None, description="null in a cache without a tail sketch")
    fidelity: Fidelity | None = Field(None, description="null where it was not measured")
    versions: dict[str, str] = Field(description="of the libraries that computed the logits")
    shards: list[ShardInfo]

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

    def to_json(self) -> bytes:
        """As it stands in the file."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a cache's manifest.

        Raises:
            CachekdError: there is none, or it cannot be read by this version.
        """
        path = folder / MANIFEST_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CachekdError(
                "this is not a cache, or its dump did not finish",
                where=str(folder),
                expected=MANIFEST_FILE,
                found=", ".join(sorted(p.name for p in folder.iterdir())[:5])
                if folder.is_dir()
                else "no folder",
                fix="run `cachekd dump` into a new folder",
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _damaged(path, str(error)) from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CachekdError(
                "the cache was written by a newer cachekd",
                where=str(path),
                expected=f"format_version up to {FORMAT_VERSION}",
                found=version,
                fix="pip install --upgrade cachekd",
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _damaged(path: Path, found: str) -> CachekdError:
    return CachekdError(
        "the manifest cannot be read",
        where=str(path),
        expected="what `cachekd dump` wrote (schemas/manifest.schema.json)",
        found=found,
        fix="restore it from where the cache came from, or dump again",
    )
