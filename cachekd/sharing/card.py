"""The data set card of a published cache: what the manifest says, for people and for the hub's search."""

from __future__ import annotations

import re
from typing import Any

import jinja2
from huggingface_hub import DatasetCardData

from cachekd.cache.manifest import Manifest
from cachekd.describe import bytes_per_token, lineage
from cachekd.errors import CachekdError

UNKNOWN = "unknown"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(manifest: Manifest, address: str, license: str | None) -> str:
    """The card's Markdown with its YAML header.

    Args:
        address: where the cache will be, which the commands in the card name.
        license: as the hub names it (`apache-2.0`, `cc-by-4.0`, `other`); None: unknown.

    Raises:
        CachekdError: the licence is no such name.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise CachekdError(
            "this is no name of a licence",
            where="--license",
            expected="as the hub names them: apache-2.0, mit, cc-by-4.0, cc-by-nc-4.0, other, unknown, ...",
            found=license,
        )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cachekd", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    name = address.rstrip("/").rpartition("/")[2].partition("@")[0]
    return environment.get_template("dataset_card.md.jinja").render(
        header=_header(manifest, name, license or UNKNOWN),
        name=name,
        address=address if "://" in address else f"hf://datasets/{address}",
        unknown_license=(license or UNKNOWN) == UNKNOWN,
        license=license,
        rows=[(label, _cell(value)) for label, value in _facts(manifest)],
        manifest=manifest,
    )


def _header(manifest: Manifest, name: str, license: str) -> str:
    size = next((tag for limit, tag in _SIZES if manifest.samples < limit), "n>1M")
    data = DatasetCardData(
        license=license,
        pretty_name=name,
        tags=["cachekd", "switch-kd", "knowledge-distillation", "logits", "vision-language-models"],
        task_categories=["image-text-to-text"],
        size_categories=[size],
        viewer=False,  # shards are no tables
    )
    return data.to_yaml()


def _facts(manifest: Manifest) -> list[tuple[str, Any]]:
    teacher, codec, total = manifest.teacher, manifest.codec, manifest.size + manifest.sketch_bytes
    tail = (
        "spread evenly" if codec.tail == "none" else f"from a sketch of the final hidden state ({codec.tail})"
    )
    rows: list[tuple[str, Any]] = [
        ("teacher", f"{teacher.name} ({teacher.model_type}, {teacher.dtype})"),
        ("vocabulary", f"{teacher.vocab_size:,} ids"),
        *(("data", f"{s.data.path} ({s.data.samples:,} samples)") for s in manifest.sources),
        ("samples", f"{manifest.samples:,}"),
        ("left out", f"{manifest.skipped.samples:,} (skipped.jsonl)" if manifest.skipped else "none"),
        ("answer tokens", f"{manifest.tokens:,}"),
        ("size", f"{total:,} bytes in {len(manifest.shards):,} shards"),
        ("bytes per token", bytes_per_token(manifest.size, manifest.sketch_bytes, manifest.tokens)),
        ("kept exactly", f"up to {codec.top_k} logprobs a token, in steps of {codec.logprob_step} nats"),
        ("all other logprobs", tail),
        ("Kneedle", f"window {codec.window}, least k {codec.min_k}"),
    ]
    if manifest.fidelity is not None:
        measured = manifest.fidelity
        rows += [
            ("KL(live teacher, cache)", f"{measured.kl:.5f} nats over {measured.tokens:,} tokens"),
            ("cosine of DBiLD's gradients", f"{measured.cosine:.4f}, live and cached"),
        ]
    rows += lineage(manifest).items()
    fingerprints = manifest.fingerprints
    return rows + [
        ("teacher's weights", teacher.weights_sha256),
        ("tokenizer", fingerprints.tokenizer),
        ("chat template", fingerprints.chat_template),
        ("image processing", fingerprints.image_processor),
        *([("encoding", fingerprints.encoding)] if fingerprints.encoding is not None else []),
        ("manifest", manifest.sha256),
    ]


def _cell(value: Any) -> str:
    """Text in a Markdown table, whatever is in a path."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)
