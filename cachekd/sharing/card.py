"""The data set card of a published cache: what the manifest says, for people and for the hub's search."""

from __future__ import annotations

import re

import jinja2
from huggingface_hub import DatasetCardData

from cachekd.cache.manifest import Manifest
from cachekd.cache.overview import bytes_per_token, fidelity, fingerprints, origin
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
        rows=[(label, _cell(value)) for label, value in _facts(manifest).items()],
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


def _facts(manifest: Manifest) -> dict[str, str]:
    left_out = f"{manifest.skipped.samples:,} (skipped.jsonl)" if manifest.skipped else "none"
    return {
        **origin(manifest),
        "samples": f"{manifest.samples:,}",
        "left out": left_out,
        "answer tokens": f"{manifest.tokens:,}",
        "size": f"{manifest.size + manifest.sketch_bytes:,} bytes in {len(manifest.shards):,} shards",
        "bytes per token": bytes_per_token(manifest.size, manifest.sketch_bytes, manifest.tokens),
        **fidelity(manifest),
        **fingerprints(manifest),
    }


def _cell(value: str) -> str:
    """Text in a Markdown table, whatever is in a path."""
    text = " ".join(value.split())
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)
