"""What a run learns from, by its content: a run that is gone on with has to read the same."""

from __future__ import annotations

import hashlib

from cachekd.cache.compare import identity
from cachekd.check.bind import Binding
from cachekd.config import TrainConfig
from cachekd.data import Samples
from cachekd.data.open import content_hash, keys_hash
from cachekd.data.sources.urls import is_remote
from cachekd.open_run import OpenRun


def inputs_of(config: TrainConfig, opened: OpenRun) -> dict[str, str]:
    """sha256 of each input, by the name of its setting.

    Of data: the keys in order, and up to 32 samples unless they would have to be fetched. Of models: all
    files that are read, or the hub's commit; of a teacher behind a cache nothing, as the cache knows whose
    it is.

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
    found["student"] = opened.models.student.content
    if opened.models.teacher is not None and opened.cache is None:
        found["teacher"] = opened.models.teacher.content
    return found


def _data(spec: str, samples: Samples) -> str:
    content = "" if is_remote(str(spec)) else content_hash(samples)
    return hashlib.sha256(f"{keys_hash(samples)} {content}".encode()).hexdigest()
