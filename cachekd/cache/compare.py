"""What must be equal for logits to belong together."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from cachekd.cache.manifest import Header, Manifest, ShardInfo
from cachekd.cache.source import Source
from cachekd.errors import CachekdError

ENCODING = "encoding of a probe text"  # not known of caches from before there was such a fingerprint


def dependencies(header: Header, source: Source | None = None) -> dict[str, Any]:
    """What a cache depends on, by names for people. Where things lie is not among it.

    Args:
        source: for going on with the very same dump: also its data and libraries.
    """
    teacher, prints, codec = header.teacher, header.fingerprints, header.codec
    found: dict[str, Any] = {
        "teacher's weights": teacher.weights_sha256,
        "teacher's configuration": teacher.config_sha256,
        "teacher's dtype": teacher.dtype,
        "vocabulary size": teacher.vocab_size,
        "tokenizer": prints.tokenizer,
        "chat template": prints.chat_template,
        "image processing": prints.image_processor,
        "image token": prints.image_token,
        ENCODING: prints.encoding,
        **{f"setting {name}": value for name, value in codec.model_dump().items()},
    }
    if (quantised := teacher.quantization) is not None:
        by = "" if source is None else f", version {quantised.version}"
        found["teacher's quantisation"] = f"{quantised}{by}"
    if source is None:
        return found
    # Not of finished caches: images that another version reads otherwise are told by their content hashes.
    found["reading of images"] = prints.image_reading
    if source.geometry is not None:
        if source.geometry.disk_budget is not None:  # it decides these
            for name in ("top_k", "top_p", "tail"):
                del found[f"setting {name}"]
        found["setting disk_budget"] = source.geometry.disk_budget
        found["disk budget's settings"] = source.geometry.budget_for
        found["setting calibration_tokens"] = source.geometry.calibration_tokens
    data = source.data.model_dump(
        exclude={"path", "sha256", "content_sha256", "repeated_keys", "other_files"}
    )
    found["setting attn_implementation"] = source.attn_implementation
    found["setting float32_head"] = source.float32_head
    found["data set"] = source.data.sha256
    found["content of the data set"] = source.data.content_sha256
    found |= {**{f"data set's {name}": data[name] for name in data}}
    return found | {f"version of {name}": version for name, version in source.versions.items()}


def require_same(old: dict[str, Any], new: dict[str, Any], what: str, where: str) -> None:
    """Compare `dependencies`.

    Args:
        what: was made with the old ones.
        where: it is.

    Raises:
        CachekdError: they differ; in what, old and new.
    """
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    names = [name for name in names if name != ENCODING or None not in (old.get(name), new.get(name))]
    if names:
        others = f" (and {len(names) - 1} more: {', '.join(names[1:6])})" if names[1:] else ""
        raise CachekdError(
            f"{what} was made with a different {names[0]}{others}",
            where=where,
            expected="; ".join(f"{name} {_told(old.get(name))}" for name in names[:6]),
            found="; ".join(f"{name} {_told(new.get(name))}" for name in names[:6]),
            fix="give it what it was made with, or dump into a new folder",
        )


def _told(value: Any) -> Any:
    return "none" if value is None else value


def identity(manifest: Manifest) -> str:
    """sha256 over what a cache holds, by which a run knows it again.

    A shard that the teacher can make again (`cachekd verify --repair`) counts by its samples: on another
    machine it may round otherwise, and its checksum is another then. All others count by their bytes. What
    token ids stand for follows from the tokenizer, and counts by that.
    """
    left_out = {"sha256", "vocabulary", "lineage", "fidelity", "skipped", "shards"}
    values = manifest.model_dump(mode="json", exclude=left_out)
    shards = [_shard_identity(info) for info in manifest.shards]
    return hashlib.sha256(json.dumps([values, shards], sort_keys=True).encode()).hexdigest()


def _shard_identity(info: ShardInfo) -> list[Any]:
    again = info.span is not None and info.samples_sha256 is not None
    held = [info.span, info.samples_sha256] if again else info.sha256
    return [info.name, info.source, info.sketch, info.samples, info.tokens, held]
