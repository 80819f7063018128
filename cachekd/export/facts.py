"""What goes beside an export: whose logits these are, and how they were cut."""

from __future__ import annotations

from typing import Any

from cachekd.cache import LogitCache

FACTS_FILE = "cachekd_export.json"
EXPORT_VERSION = 1


def facts_of(cache: LogitCache, top_k: int | None) -> dict[str, Any]:
    """As JSON has it."""
    manifest = cache.manifest
    return {
        "export_version": EXPORT_VERSION,
        "manifest_sha256": manifest.sha256,
        "teacher": manifest.teacher.model_dump(mode="json"),
        "fingerprints": manifest.fingerprints.model_dump(mode="json"),
        "codec": manifest.codec.model_dump(mode="json"),
        "top_k": top_k,
        "samples": manifest.samples,
        "tokens": manifest.tokens,
    }
