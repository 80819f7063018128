"""Scores on public benchmarks, through lmms-eval.

lmms-eval is installed in an environment of its own (docs/how-to/benchmarks.md). What needs it imports it when it
runs. lmms-eval finds `manifest` by the entry point in pyproject.toml, and so
`lmms-eval --model cachekd --model_args pretrained=RUN` works too.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval has to know of our model. It asks for this at every start, so neither torch nor
    transformers is imported for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="cachekd", chat_class_path="cachekd.lmms.adapter.Chat")
