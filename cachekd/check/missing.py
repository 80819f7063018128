"""Samples of a data set that a cache lacks: which, why, and what can be done about it."""

from __future__ import annotations

from dataclasses import dataclass

from cachekd.cache import DataInfo, LogitCache
from cachekd.cache.plan import read_skipped
from cachekd.config import DataOptions
from cachekd.data import Samples
from cachekd.data.limits import TOO_LONG
from cachekd.data.open import keys_hash
from cachekd.data.sample import Subset
from cachekd.errors import CachekdError

# Of `DataOptions`: which samples there are, and what they are called.
DECIDING = ("data", "map", "key", "limit", "shuffle_seed")


@dataclass(frozen=True)
class MissingSamples:
    """What a cache lacks of a data set, by key, in the data's order.

    Attributes:
        skipped: that the dump left out by name, and why.
        beyond: of these data, beyond the part that was dumped (its limit).
        others: of which nothing is known.
        dumped: the data that were dumped, where it was one data set.
        data: how these were opened; None where their keys are not the dump's.
    """

    skipped: dict[str, str]
    beyond: list[str]
    others: list[str]
    dumped: DataInfo | None = None
    data: DataOptions | None = None

    def __len__(self) -> int:
        return len(self.skipped) + len(self.beyond) + len(self.others)

    @property
    def reasons(self) -> dict[str, str]:
        """Why each is missing, in one line."""
        return (
            {key: f"the dump left it out: {reason}" for key, reason in self.skipped.items()}
            | dict.fromkeys(self.beyond, f"it is beyond the dump's {self._part}")
            | dict.fromkeys(self.others, "the cache lacks it")
        )

    @property
    def _part(self) -> str:
        """The options of the part that was dumped."""
        if self.dumped is None:
            return ""
        seed = self.dumped.shuffle_seed
        return f"--limit {self.dumped.limit}" + ("" if seed is None else f" --shuffle-seed {seed}")

    @property
    def _read_otherwise(self) -> dict[str, tuple[object, object]]:
        """Options that the dump read with others than this run, where that may be why."""
        if not self.others or self.dumped is None or self.data is None:
            return {}
        theirs = {name: getattr(self.dumped, "path" if name == "data" else name) for name in DECIDING}
        values = {name: (value, getattr(self.data, name)) for name, value in theirs.items()}
        return {name: (theirs, ours) for name, (theirs, ours) in values.items() if theirs != ours}

    def require_allowed(
        self, cache: LogitCache, samples: Samples, *, missing: str, on_error: str, too_long: str
    ) -> None:
        """Refuse what would not begin without them, or would stop at them.

        Args:
            missing, on_error, too_long: the run's, as `TrainConfig` has them.

        Raises:
            CachekdError: with what will work.
        """
        if missing == "error" and len(self):
            raise self.error(cache, samples)
        bad = {
            key: reason
            for key, reason in self.skipped.items()
            if too_long != "skip" or not reason.startswith(TOO_LONG)
        }
        if missing == "ce-only" and on_error == "stop" and bad:
            key, reason = next(iter(bad.items()))
            raise CachekdError(
                "the dump left bad samples out, and training them by L_CE alone would stop at them",
                where=str(cache.path),
                expected="--on-error skip beside --missing ce-only",
                found=f"{len(bad):,} of them, such as {key!r}: {reason}",
                fix="add --on-error skip: it leaves out those that this run cannot use either; or --missing "
                "skip, which leaves out whatever the cache lacks",
            )

    def error(self, cache: LogitCache, samples: Samples, fix: str | None = None) -> CachekdError:
        """The refusal, with what will work.

        Args:
            fix: that is; by default what training can do.
        """
        first = next(key for key in samples.keys if key not in cache)
        return CachekdError(
            "the cache lacks samples of the data set",
            where=str(cache.path),
            expected=f"all {len(samples):,} samples",
            found="; ".join([f"{len(self):,} are missing, the first is {first!r}", *self.causes()]),
            fix=fix or "; ".join(self._fixes(some_are_there=len(self) < len(samples))),
        )

    def causes(self) -> list[str]:
        """Why they are missing, as far as that is known."""
        causes = []
        if self.skipped:
            key, reason = next(iter(self.skipped.items()))
            causes.append(f"the dump left {len(self.skipped):,} out, such as {key!r}: {reason}")
        if self.beyond:
            causes.append(f"{len(self.beyond):,} are beyond its {self._part}")
        for name, (theirs, ours) in self._read_otherwise.items():
            option = f"--{name.replace('_', '-')}"
            causes.append(f"{option} was {_said(theirs)} for the dump, and is {_said(ours)} here")
        return causes

    def _fixes(self, *, some_are_there: bool) -> list[str]:
        fixes = ["--missing skip leaves them out"] if some_are_there else []
        if some_are_there and (self.beyond or self.others):
            stops = self.skipped and (self.data is None or self.data.on_error == "stop")
            also = " --on-error skip" if stops else ""
            fixes.append(f"--missing ce-only{also} trains by L_CE alone those that can be read")
        if self.beyond:
            fixes.append(f"{self._part} is the part that was dumped")
        if self._read_otherwise.keys() - {"data"}:
            fixes.append("or read the data as the dump did")
        elif self.others and self.data is not None:
            fixes.append("`cachekd bind` finds samples that have other keys in the cache")
        mended = "mend what was left out, and " if self.skipped else ""
        fixes.append(f"or {mended}dump these data into a new folder")
        return fixes


def missing_samples(cache: LogitCache, samples: Samples, data: DataOptions | None) -> MissingSamples:
    """What a cache lacks of a data set.

    Args:
        data: how the samples were opened; None where their keys are not the dump's (a binding).

    Raises:
        CachekdError: its skipped.jsonl is damaged.
    """
    lacking = [key for key in samples.keys if key not in cache]
    if not lacking:
        return MissingSamples({}, [], [])
    wanted = set(lacking)
    left_out = read_skipped(cache.path, cache.manifest.skipped)
    reasons = {sample.key: sample.reason for sample in left_out if sample.key in wanted}
    skipped = {key: reasons[key] for key in lacking if key in reasons}
    rest = [key for key in lacking if key not in reasons]
    dumped = dumped_data(cache)
    part = None if dumped is None or data is None else _dumped_part(samples, data, dumped)
    if part is None:
        return MissingSamples(skipped, [], rest, dumped, data)
    inside = set(part.keys)
    beyond = [key for key in rest if key not in inside]
    return MissingSamples(skipped, beyond, [key for key in rest if key in inside], dumped, data)


def dumped_data(cache: LogitCache) -> DataInfo | None:
    """The data that a cache is of; None where it was merged of several dumps, which are not told apart."""
    sources = cache.manifest.sources
    return sources[0].data if len(sources) == 1 else None


def _dumped_part(samples: Samples, data: DataOptions, dumped: DataInfo) -> Samples | None:
    """Those of the samples that the dump's limit took, if it read these very data."""
    if dumped.limit is None:
        return None
    if data.limit is None and data.shuffle_seed is None:
        part = Subset(samples, limit=dumped.limit, shuffle_seed=dumped.shuffle_seed)
    else:
        part = Subset(samples, limit=dumped.limit)
    return part if keys_hash(part) == dumped.sha256 else None


def _said(value: object) -> str:
    return "not given" if value is None else str(value)
