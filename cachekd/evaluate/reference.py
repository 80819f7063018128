"""What the teacher said of every question: kept from its own pass, or read from a cache of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cachekd.cache import CachedTargets, LogitCache
from cachekd.cache.tail.encoder import OutputHead
from cachekd.check.match import check_content
from cachekd.errors import CachekdError
from cachekd.evaluate.questions import AskedSample
from cachekd.losses.targets import DenseTargets, TeacherTargets


class Reference(Protocol):
    """The teacher at the answers of questions. It is not in memory itself.

    Attributes:
        name: the teacher's path.
    """

    name: str

    def of(self, sample: AskedSample) -> list[Any]:
        """What there is of each of a sample's questions. A sample that is not there is never asked about.

        Raises:
            CachekdError: it is another, or its answer tokens are others for the teacher.
        """
        ...

    def joined(self, parts: Sequence[Any]) -> tuple[TeacherTargets, Tensor]:
        """Join the teacher's N answer tokens of some questions, one after the other, on the models' device.

        Args:
            parts: of `of`.

        Returns:
            the targets, and [N] int64, the tokens that the teacher prefers.
        """
        ...


class KeptStates:
    """The teacher's final hidden states at the answer tokens, and its head, which makes its logits of them.

    Args:
        name: the teacher's path.
        head: on the device where targets are wanted.
        states: by a sample's key, for each of its questions the answer tokens [n] int64 and the states
            [n, d], on the CPU.
    """

    def __init__(
        self, name: str, head: OutputHead, states: Mapping[str, list[tuple[Tensor, Tensor]]]
    ) -> None:
        self.name, self._head, self._states = name, head, states

    def of(self, sample: AskedSample) -> list[tuple[Tensor, Tensor]]:
        """See `Reference.of`."""
        found = self._states[sample.key]
        for question, (token_ids, _) in zip(sample.encoded, found, strict=True):
            _require_same(question.token_ids, token_ids, f"sample {sample.key!r}")
        return found

    def joined(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[DenseTargets, Tensor]:
        """See `Reference.joined`."""
        device = self._head.weight.device
        token_ids, states = (torch.cat(some).to(device) for some in zip(*parts, strict=True))
        logits = self._head.logits(states)
        return DenseTargets(logits, token_ids), logits.argmax(-1)


class CachedReference:
    """A cache of the data that the questions are from.

    The dump showed the teacher whole conversations. So its answers are those to our questions only where
    nothing is left out before them.
    """

    def __init__(self, cache: LogitCache, device: torch.device) -> None:
        self.name = cache.manifest.teacher.name
        self._cache, self._device = cache, device

    def of(self, sample: AskedSample) -> list[CachedTargets]:
        """See `Reference.of`."""
        where = f"sample {sample.key!r} of {self._cache.path}"
        if not sample.whole:
            raise CachekdError(
                "the cache has the teacher's answers within their conversation, not to questions asked alone",
                where=where,
                fix="--history full asks them so; or --teacher in place of --cache asks the teacher itself",
            )
        if not sample.encoded:
            return []
        check_content(self._cache, sample.key, sample.content_hash)
        targets = self._cache[sample.key]
        if sample.rows is not None and len(sample.rows) == len(targets):
            targets = targets.select(torch.nonzero(sample.rows >= 0).squeeze(1))
        _require_same(torch.cat([one.token_ids for one in sample.encoded]), targets.token_ids, where)
        counts = [len(question.token_ids) for question in sample.encoded]
        return [targets.select(rows) for rows in torch.arange(len(targets)).split(counts)]

    def joined(self, parts: Sequence[CachedTargets]) -> tuple[CachedTargets, Tensor]:
        """See `Reference.joined`."""
        targets = CachedTargets.cat(parts).to(self._device)
        return targets, targets.ids[:, 0]


def _require_same(ours: Tensor, theirs: Tensor, where: str) -> None:
    if not torch.equal(ours, theirs):
        raise CachekdError(
            "the answer tokens differ between a model and the teacher",
            where=where,
            expected=f"the teacher's {len(theirs)} tokens",
            found=f"{len(ours)} tokens, or others",
            fix="give the model the teacher's chat template, or evaluate without the teacher",
        )
