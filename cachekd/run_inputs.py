"""What a run learns from, by its content: a run that is gone on with has to read the same."""

from __future__ import annotations

import hashlib
from typing import Any

from cachekd.bind import Binding
from cachekd.cache.compare import identity
from cachekd.config import TrainConfig
from cachekd.open_run import OpenRun
from cachekd.pipeline.inputs import Known, model_content
from cachekd.samples import Samples
from cachekd.samples.open import content_hash, keys_hash
from cachekd.samples.tar_urls import is_remote
from cachekd.vlm import load_config


def inputs_of(config: TrainConfig, opened: OpenRun, known: dict[str, Any]) -> dict[str, str]:
    """sha256 of each input, by the name of its setting.

    Of data: the keys in order, and up to 32 samples unless they would have to be fetched. Of models: all
    files that are read, or the hub's commit; of a teacher behind a cache nothing, as the cache knows whose
    it is.

    Args:
        known: models hashed before, as in JSON; kept up to date. They are hashed again only if names, sizes
            or times of their files have changed.

    Raises:
        CachekdError: the data cannot be read.
    """
    found: dict[str, str] = {}
    if opened.cache is not None:
        found["cache"] = identity(opened.cache.manifest)
    if config.binding is not None:
        found["binding"] = Binding.read(config.binding).identity
    found["data"] = _data(config.data, opened.samples)
    if config.eval_data is not None and opened.held_out is not None:
        found["eval_data"] = _data(config.eval_data.data, opened.held_out.samples)
        if opened.held_out.cache is not None:
            found["eval_cache"] = identity(opened.held_out.cache.manifest)
    models = {place: Known.model_validate(value) for place, value in known.items()}
    found["student"] = _model(config.student, models)
    if config.runs_teacher and opened.cache is None:
        found["teacher"] = _model(str(config.teacher), models)
    known.update({place: model.model_dump() for place, model in models.items()})
    return found


def _data(spec: str, samples: Samples) -> str:
    content = "" if is_remote(str(spec)) else content_hash(samples)
    return hashlib.sha256(f"{keys_hash(samples)} {content}".encode()).hexdigest()


def _model(name: str, known: dict[str, Known]) -> str:
    content = model_content(name, known)
    if content is not None:
        return content
    return f"hub:{getattr(load_config(name), '_commit_hash', None)}"
