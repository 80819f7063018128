"""What the teacher said of every question: kept from its own pass, or read from a cache of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from cachekd.cache import CachedTargets, LogitCache
from cachekd.cache.tail.encoder import OutputHead
from cachekd.check.match import check_content
from cachekd.check.vocabulary import cut_to, vocabulary_of_cache
from cachekd.errors import CachekdError
from cachekd.evaluate.inputs import NO_VOCABULARY
from cachekd.evaluate.questions import AskedSample
from cachekd.losses.chunked import LiveTargets
from cachekd.losses.targets import DenseTargets, TeacherTargets
from cachekd.models import ModelFiles
from cachekd.models.fingerprint import tokenizer_fingerprint
from cachekd.vocabulary import TokenBytes


class Reference(Protocol):
    """The teacher at the answers of questions. It is not in memory itself.

    What there is of a question is its *part*: `token_ids` [n] int64, the teacher's answer tokens, and what
    it says at them.
    """

    @property
    def name(self) -> str:
        """The teacher's path."""
        ...

    @property
    def tokenizer(self) -> str:
        """The fingerprint of the teacher's."""
        ...

    @property
    def vocabulary(self) -> TokenBytes:
        """What the teacher's token ids stand for, those that it has logits of."""
        ...

    def of_same_tokens(self, sample: AskedSample) -> list[Any] | None:
        """The part of each of a sample's questions, where the answers are the same tokens for the model that
        is asked; None where they are not. The model has the teacher's tokenizer.

        Raises:
            CachekdError: the sample is not the one that the teacher was asked about.
        """
        ...

    def of(self, sample: AskedSample) -> list[Any] | None:
        """The part of each of a sample's questions, whatever the model's tokens are; None where the teacher's
        answers cannot be told apart.

        Raises:
            CachekdError: as above.
        """
        ...

    def joined(self, parts: Sequence[Any]) -> tuple[TeacherTargets, Tensor]:
        """Join the teacher's N answer tokens of some questions, one after the other, on the models' device.

        Returns:
            the targets, and [N] int64, the tokens that the teacher prefers.
        """
        ...

    def at(self, parts: Sequence[Any], rows: Tensor) -> TeacherTargets | LiveTargets:
        """Some of these N answer tokens, by their indices [M] int64; of a few at a time (`select`) there are
        targets."""
        ...


@dataclass(frozen=True)
class KeptAnswer:
    """The teacher at one answer.

    Attributes:
        token_ids: [n] int64.
        states: [n, d], what its head reads at each; on the CPU.
    """

    token_ids: Tensor
    states: Tensor


class KeptStates:
    """The teacher's final hidden states at the answer tokens, and its head, which makes its logits of them.

    Args:
        teacher: its files.
        head: on the device where targets are wanted.
        answers: by a sample's key, for each of its questions.
    """

    def __init__(
        self, teacher: ModelFiles, head: OutputHead, answers: Mapping[str, list[KeptAnswer]]
    ) -> None:
        self.name, self._teacher, self._head, self._answers = teacher.path, teacher, head, answers

    @cached_property
    def tokenizer(self) -> str:
        """See `Reference.tokenizer`."""
        return tokenizer_fingerprint(self._teacher.processor.tokenizer)

    @cached_property
    def vocabulary(self) -> TokenBytes:
        """See `Reference.vocabulary`."""
        return cut_to(self._teacher.token_bytes, self._vocab_size)

    def of_same_tokens(self, sample: AskedSample) -> list[KeptAnswer] | None:
        """See `Reference.of_same_tokens`."""
        found = self.of(sample)
        pairs = zip(sample.encoded, found, strict=True)
        return found if all(torch.equal(one.token_ids, kept.token_ids) for one, kept in pairs) else None

    def of(self, sample: AskedSample) -> list[KeptAnswer]:
        """See `Reference.of`."""
        return self._answers[sample.key]

    def joined(self, parts: Sequence[KeptAnswer]) -> tuple[DenseTargets, Tensor]:
        """See `Reference.joined`."""
        token_ids, states = self._all(parts)
        logits = self._head.logits(states)
        return DenseTargets(logits, token_ids), logits.argmax(-1)

    def at(self, parts: Sequence[KeptAnswer], rows: Tensor) -> LiveTargets:
        """See `Reference.at`."""
        token_ids, states = self._all(parts)
        return LiveTargets(token_ids[rows], states[rows], self._head.logits, self._vocab_size)

    @property
    def _vocab_size(self) -> int:
        return len(self._head.weight)

    def _all(self, parts: Sequence[KeptAnswer]) -> tuple[Tensor, Tensor]:
        device = self._head.weight.device
        token_ids, states = zip(*((part.token_ids, part.states) for part in parts), strict=True)
        return torch.cat(token_ids).to(device), torch.cat(states).to(device)


class CachedReference:
    """A cache of the data that the questions are from.

    The dump showed the teacher whole conversations. So its answers are those to our questions only where
    nothing is left out before them.

    Args:
        device: where targets are wanted.
        models: that may know what the ids of an older cache stand for.
    """

    def __init__(self, cache: LogitCache, device: torch.device, models: Sequence[ModelFiles] = ()) -> None:
        self.name, self.tokenizer = cache.manifest.teacher.name, cache.manifest.fingerprints.tokenizer
        self._cache, self._device, self._models = cache, device, models

    @cached_property
    def vocabulary(self) -> TokenBytes:
        """See `Reference.vocabulary`."""
        return vocabulary_of_cache(self._cache, self._models, fix=NO_VOCABULARY)

    def of_same_tokens(self, sample: AskedSample) -> list[CachedTargets] | None:
        """See `Reference.of_same_tokens`."""
        targets = self._targets(sample)
        if targets is None:
            return []
        if sample.rows is not None and len(sample.rows) == len(targets):
            targets = targets.select(torch.nonzero(sample.rows >= 0).squeeze(1))
        counts = [len(question.token_ids) for question in sample.encoded]
        if not torch.equal(torch.cat([one.token_ids for one in sample.encoded]), targets.token_ids):
            return None
        return [targets.select(rows) for rows in torch.arange(len(targets)).split(counts)]

    def of(self, sample: AskedSample) -> list[CachedTargets] | None:
        """See `Reference.of`. An answer goes to the end of its turn."""
        targets = self._targets(sample)
        if targets is None:
            return []
        rows, end = torch.arange(len(targets)), self.vocabulary.end_of_turn
        answers: Sequence[Tensor] = [rows]
        if len(sample.numbers) > 1 and end is not None:
            ends = torch.nonzero(targets.token_ids == end).squeeze(1) + 1
            answers = [answer for answer in rows.tensor_split(ends) if len(answer)]
        if len(answers) != len(sample.numbers):
            return None
        asked = dict(zip(sample.numbers, answers, strict=True))
        return [targets.select(asked[number]) for number in range(len(sample.encoded))]

    def _targets(self, sample: AskedSample) -> CachedTargets | None:
        """All that the cache has of a sample; None where nothing is asked."""
        if not sample.whole:
            raise CachekdError(
                "the cache has the teacher's answers within their conversation, not to questions asked alone",
                where=f"sample {sample.key!r} of {self._cache.path}",
                fix="--history full asks them so; or --teacher in place of --cache asks the teacher itself",
            )
        if not sample.encoded:
            return None
        check_content(self._cache, sample.key, sample.content_hash)
        return self._cache[sample.key]

    def joined(self, parts: Sequence[CachedTargets]) -> tuple[CachedTargets, Tensor]:
        """See `Reference.joined`."""
        targets = CachedTargets.cat(parts).to(self._device)
        return targets, targets.ids[:, 0]

    def at(self, parts: Sequence[CachedTargets], rows: Tensor) -> CachedTargets:
        """See `Reference.at`."""
        return CachedTargets.cat(parts).select(rows).to(self._device)
