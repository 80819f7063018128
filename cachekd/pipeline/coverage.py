"""Will a train step find its samples in the cache, and something to switch? Asked before the first step."""

from __future__ import annotations

from collections.abc import Mapping

from cachekd.cache import LogitCache
from cachekd.config import DumpConfig, TrainConfig
from cachekd.data_options import DataOptions
from cachekd.errors import CachekdError
from cachekd.missing import missing_samples
from cachekd.open_run import require_pictures
from cachekd.pipeline.inputs import is_hub_data
from cachekd.samples import Samples, open_samples
from cachekd.samples.tar_urls import is_remote
from cachekd.sharing.store import is_address

# Options that decide which samples there are, and what they are called.
_DECIDING = ("data", "map", "key", "limit", "shuffle_seed")


def check_coverage(config: TrainConfig, dumps: Mapping[str, DumpConfig]) -> None:
    """Refuse a train step whose cache lacks samples, or will; data that are not on this disk are not opened.

    Args:
        dumps: those that are to run, by the folder of their cache.

    Raises:
        CachekdError: samples are missing or may be, and the step does not say what to do with them; or no
            sample has a picture for L_VSD.
    """
    dump = None if config.cache is None else dumps.get(config.cache)
    strict = config.cache is not None and config.missing == "error" and config.binding is None
    if strict and dump is not None:
        _refuse_skipping(dump, str(config.cache))
    if not _on_this_disk(config):
        return
    samples = open_samples(config)
    require_pictures(config, samples, None)
    if not strict or is_address(str(config.cache)):
        return
    if dump is not None:
        _refuse_other_samples(config, samples, dump)
        return
    cache = LogitCache(str(config.cache))
    if lacking := missing_samples(cache, samples, config):
        raise lacking.error(cache, samples)


def _refuse_skipping(dump: DumpConfig, cache: str) -> None:
    for name in ("on_error", "too_long"):
        if getattr(dump, name) == "skip":
            raise CachekdError(
                "the dump may leave samples out, and this step would not begin without them",
                where=f"settings 'missing', and {name!r} of the step that writes {cache}",
                expected="missing: skip or missing: ce-only",
                found=f"missing: error, and {name}: skip",
                fix="missing: skip leaves the same samples out; it is nothing where the dump left none out",
            )


def _refuse_other_samples(config: TrainConfig, samples: Samples, dump: DumpConfig) -> None:
    differing = [name for name in _DECIDING if getattr(config, name) != getattr(dump, name)]
    if not differing or not _on_this_disk(dump):
        return
    dumped = set(open_samples(dump).keys)
    lacking = [key for key in samples.keys if key not in dumped]
    if lacking:
        raise CachekdError(
            "the cache will lack samples of the data set",
            where=f"{config.data} and {config.cache}",
            expected="samples that the step above dumps",
            found=f"{len(lacking):,} others of {len(samples):,}, the first is {lacking[0]!r}; "
            + ", ".join(
                f"{name} is {getattr(dump, name)} there and {getattr(config, name)} here"
                for name in differing
            ),
            fix="missing: skip leaves them out, missing: ce-only trains them by L_CE alone; or say the "
            "same of these data as in the dump step",
        )


def _on_this_disk(data: DataOptions) -> bool:
    return not is_remote(data.data) and not is_hub_data(data.data)
