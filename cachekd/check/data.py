"""Data and their cache as a run opens them: held-out data and those that it trains on alike."""

from __future__ import annotations

from typing import Any, NamedTuple

from cachekd.cache import CodecSettings, LogitCache
from cachekd.cache.source import DataInfo
from cachekd.check.bind import open_bound
from cachekd.check.match import check_samples
from cachekd.check.missing import dumped_data
from cachekd.check.text import ALIGN, check_text
from cachekd.config import DataOptions, DumpConfig, TrainConfig
from cachekd.data import Samples
from cachekd.data.map_function import require_map
from cachekd.data.sample import Subset
from cachekd.errors import CachekdError
from cachekd.models import BridgePlan, ModelFiles, limits_of, plan_bridge
from cachekd.models.fingerprint import reads_otherwise

# Which sample a record becomes, under which key, with which tokens; not how many of them.
_LENGTHS = ("max_tokens", "too_long")
_AS_DUMPED = ("key", "image_field", *_LENGTHS)


def as_dumped(options: DataOptions, cache: LogitCache, *, bound: bool = False) -> DataOptions:
    """The user's options, and what they do not say as the cache's dump had it.

    Args:
        bound: they are other data than the dump's, bound to the cache: how records become samples is theirs.

    Raises:
        CachekdError: the dump had a map function, which only the user may name, and they do not.
    """
    info = cache.manifest.sources[0].data
    if bound:
        return options.model_copy(update=unsaid(options, info, *_LENGTHS))
    map_function = require_map(options.map, info.map, str(cache.path))
    return options.model_copy(update={**unsaid(options, info, *_AS_DUMPED), "map": map_function})


def unsaid(options: DataOptions, dumped: DataInfo | DataOptions, *names: str) -> dict[str, Any]:
    """Those of these options that the user does not say, as the dump had them."""
    return {name: getattr(dumped, name) for name in names if name not in options.model_fields_set}


class RunModels(NamedTuple):
    """The models of a run; the teacher None where none runs in it."""

    student: ModelFiles
    teacher: ModelFiles | None

    @classmethod
    def of(cls, config: TrainConfig) -> RunModels:
        """Name the models that the settings name; nothing is opened."""
        return cls(
            ModelFiles(config.student), ModelFiles(str(config.teacher)) if config.runs_teacher else None
        )

    def bridge_plan(self) -> BridgePlan:
        """What a switch bridge brings to what; see `plan_bridge`. There has to be a teacher."""
        assert self.teacher is not None
        own_text = self.teacher.reads_otherwise(self.student)
        return plan_bridge(self.teacher.config, self.student.config, own_text=own_text)

    def within(self, *, across: bool, **said: Any) -> RunModels:
        """Read samples within the models' limits: what both allow; across tokenizers each within its own, as
        the tokens of one are none of the other's.

        Args:
            said: settings of `limits_of`.
        """
        there = [model for model in self if model is not None]
        limits = limits_of([model.config for model in there], **said)
        own = (limits_of([model.config], **said) if across else limits for model in there)
        student, *teacher = (model.within(each) for model, each in zip(there, own, strict=True))
        return RunModels(student, teacher[0] if teacher else None)


def open_cache(config: TrainConfig) -> LogitCache | None:
    """The cache, under the data's keys; None if none is used.

    Raises:
        CachekdError: it cannot be read, was made with other settings of Kneedle, or has fewer ids than a
            loss asks for.
    """
    if not config.distils or config.cache is None:
        return None
    cache = open_bound(config.cache, config.binding)
    require_kneedle(config, cache.manifest.codec, str(cache.path), cache)
    require_ids(config, cache.manifest.teacher.vocab_size, str(cache.path))
    return cache


def require_ids(config: TrainConfig, ids: int, where: str) -> None:
    """Refuse losses that ask for more of the teacher's largest logits than it has ids.

    Args:
        where: the cache of so many ids.

    Raises:
        CachekdError: one does.
    """
    for term, loss in config.losses.items():
        if (k := getattr(loss, "k", 0)) > ids:
            raise CachekdError(
                "the loss asks for more ids than the teacher has",
                where=f"setting '{term}.k'",
                expected=f"at most {ids:,}, as in {where}",
                found=k,
            )


def require_kneedle(
    config: TrainConfig, cached: CodecSettings | DumpConfig, where: str, cache: LogitCache | None = None
) -> None:
    """Refuse settings of Kneedle with which a cache cannot say what the teacher's largest logits are.

    They are those of each DBiLD that is on, where the teacher leads: a student's own logits have no limits.

    Args:
        cached: the cache's settings, or those that it will have.
        where: the cache.
        cache: it, where it is there: its tokens may have more logprobs than the settings alone promise.

    Raises:
        CachekdError: a window is larger than the cache's; or it is smaller, or the least k larger, than every
            token has logprobs for.
    """
    for term, loss in config.dbilds.items():
        said = loss.arguments(dict(config)) if loss.teacher_leads else {}
        for name in ("window", "min_k"):
            ours, theirs = said.get(name), getattr(cached, name)
            if ours in (None, theirs) or (name == "min_k" and ours < theirs):
                continue
            kept = min(cached.min_k, cached.top_k)
            larger = name == "window" and ours > theirs
            if not larger and cache is not None and ours > kept:
                kept = min(cache.histogram()["k"], default=kept)
            if larger or ours > kept:
                raise CachekdError(
                    "the cache was made with another Kneedle setting",
                    where=f"setting {name if getattr(loss, name) is None else f'{term}.{name}'!r}",
                    expected=f"{theirs}, as in {where}, or up to {kept}: every token has that many logprobs",
                    found=ours,
                    fix=f"leave {name!r} out: a cache has its own; or dump with --min-k {ours}"
                    + f" --window {ours}" * larger,
                )


def length_settings(config: TrainConfig, dumped: DataInfo | DataOptions | None) -> dict[str, Any]:
    """`max_tokens` and `too_long`; those that the run does not say are as in the dump.

    Args:
        dumped: of its cache, where it has one (see `dumped_data`).
    """
    said = config.model_dump(include={"max_tokens", "too_long"})
    return said if dumped is None else said | unsaid(config, dumped, *said)


class CheckedCache(NamedTuple):
    """A cache, and whoever reads the data beside it.

    Attributes:
        cache: None if none is used.
        models: within their limits of these data.
        missing: samples that are left out because the cache lacks them, key to reason.
        across: whether what teaches read its text by another tokenizer, chat template or encoding than the
            student's.
    """

    cache: LogitCache | None
    models: RunModels
    missing: dict[str, str]
    across: bool

    def used(self, samples: Samples) -> Samples:
        """Return those of the samples that are not left out."""
        if not self.missing:
            return samples
        return Subset(samples, only=[i for i, key in enumerate(samples.keys) if key not in self.missing])


def checked_cache(
    config: TrainConfig, models: RunModels, samples: Samples | None, beside: LogitCache | None = None
) -> CheckedCache:
    """Open a run's cache, and compare it with the settings, the data and who reads these as its teacher did.

    Across tokenizers that is the teacher, where it runs. Else it is nobody, and that samples are those which
    the cache's teacher saw is told by their content.

    Args:
        samples: None where the data are not opened; then they are not compared.
        beside: another cache, which says what is done with long samples where this one does not, and who
            reads text as its teacher did.

    Raises:
        CachekdError: it cannot be read, does not match the tokenizer, the template, the data or Kneedle's
            settings; or the run would stop at samples that it lacks.
    """
    cache = open_cache(config)
    known = beside if cache is None else cache
    across = _across(config, models, known)
    said = length_settings(config, None if known is None else dumped_data(known))
    models = models.within(across=across, **said)
    missing: dict[str, str] = {}
    if cache is not None:
        if not across or not config.crosses:
            check_text(cache, models.student, instead=ALIGN if across else "")
        elif models.teacher is not None:
            check_text(cache, models.teacher, "teacher's")
    if cache is not None and samples is not None:
        data = None if config.binding is not None else config
        choices = {"missing": config.missing, "on_error": config.on_error}
        too_long = models.student.limits.too_long
        lacking = check_samples(cache, samples, data=data, too_long=too_long, **choices)
        missing = lacking.reasons if config.missing == "skip" else {}
    return CheckedCache(cache, models, missing, across)


def _across(config: TrainConfig, models: RunModels, cache: LogitCache | None) -> bool:
    """Whether what teaches, the cache's teacher or a live one, reads text otherwise than the student."""
    if cache is not None:
        return reads_otherwise(cache.manifest.fingerprints, models.student.fingerprints)
    live = models.teacher if config.live_teacher else None
    return live is not None and live.reads_otherwise(models.student)
