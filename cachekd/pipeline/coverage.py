"""Will a train step find its samples in the cache, and something to switch? Asked before the first step."""

from __future__ import annotations

from collections.abc import Mapping

from cachekd.cache import LogitCache
from cachekd.config import DumpConfig, TrainConfig
from cachekd.data_options import DataOptions
from cachekd.errors import CachekdError
from cachekd.missing import DECIDING, dumped_data, missing_samples
from cachekd.open_data import length_settings
from cachekd.open_run import require_pictures
from cachekd.paths import is_address, is_hub_data
from cachekd.samples import Samples, open_samples
from cachekd.samples.tar_urls import is_remote


def check_pictures(config: TrainConfig) -> None:
    """Refuse L_VSD for data without pictures; data that are not on this disk are not opened.

    Raises:
        CachekdError: no sample has one.
    """
    if on_this_disk(config):
        require_pictures(config, open_samples(config), None)


def check_coverage(config: TrainConfig, dumps: Mapping[str, DumpConfig]) -> None:
    """Refuse a train step whose cache lacks samples, or will; data that are not on this disk are not opened.

    Args:
        dumps: those that are to run, by the folder of their cache.

    Raises:
        CachekdError: samples are missing or may be, and the step does not say what to do with them, or would
            stop at them.
    """
    dump = None if config.cache is None else dumps.get(config.cache)
    matters = config.cache is not None and config.missing != "skip" and config.binding is None
    if matters and dump is not None:
        _refuse_skipping(config, dump)
    if not matters or not on_this_disk(config):
        return
    samples = open_samples(config)
    if dump is not None:
        if config.missing == "error":
            _refuse_other_samples(config, samples, dump)
        return
    if is_address(str(config.cache)):
        return
    cache = LogitCache(str(config.cache))
    too_long = length_settings(config, dumped_data(cache))["too_long"]
    choices = {"missing": config.missing, "on_error": config.on_error, "too_long": too_long}
    missing_samples(cache, samples, config).refuse(cache, samples, **choices)


def _refuse_skipping(config: TrainConfig, dump: DumpConfig) -> None:
    settings = {"on_error": config.on_error, "too_long": length_settings(config, dump)["too_long"]}
    for name, ours in settings.items():
        stops = "skip" not in (config.on_error, ours)
        if getattr(dump, name) == "skip" and (config.missing == "error" or stops):
            then = "not begin without them" if config.missing == "error" else "stop at them"
            raise CachekdError(
                f"the dump may leave samples out, and this step would {then}",
                where=f"settings 'missing', and {name!r} of the step that writes {config.cache}",
                expected="missing: skip, or missing: ce-only" + " with on_error: skip" * stops,
                found=f"missing: {config.missing}, on_error: {config.on_error}; and {name}: skip there",
                fix="missing: skip leaves the same samples out; it is nothing where the dump left none out",
            )


def _refuse_other_samples(config: TrainConfig, samples: Samples, dump: DumpConfig) -> None:
    differing = [name for name in DECIDING if getattr(config, name) != getattr(dump, name)]
    if not differing or not on_this_disk(dump):
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


def on_this_disk(data: DataOptions) -> bool:
    """Whether data can be opened now: others are not fetched for a check."""
    return not is_remote(data.data) and not is_hub_data(data.data)
