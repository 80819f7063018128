"""Single samples of a cache: what was said, of what, in which words."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Callable, Container, Iterator
from itertools import islice
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from cachekd.cache import CachedTargets, LogitCache, UniformTail
from cachekd.cache.sealed import Part
from cachekd.cache.subset import shard_tables
from cachekd.cache.targets import entropy_of, rows_of
from cachekd.check.match import check_content
from cachekd.config.fields import ALTERNATIVES, Order
from cachekd.data import SampleEncoder, Samples
from cachekd.data.sample import Sample, is_supervised, message_text
from cachekd.errors import CachekdError
from cachekd.report.paired import Paired, PairedStudent

Origin = Literal["kept", "sketch", "spread"]


class Alternative(Part):
    """An id that the teacher finds probable."""

    id: int
    text: str = Field(description="'#' and the id where there is no tokenizer")
    logprob: float = Field(description="nats")
    origin: Origin = Field(
        description="kept: stored; sketch: rebuilt from the tail sketch; spread: an even share of the rest"
    )


class PeekedToken(Part):
    """An answer token."""

    id: int
    text: str
    logprob: float = Field(description="the teacher's, nats")
    origin: Origin = Field(description="of that logprob, as in `alternatives`")
    rank: int = Field(description="1: the teacher's own choice; of a spread one, the first it may have")
    entropy: float = Field(description="nats, of the rebuilt distribution")
    k: int = Field(description="logprobs that are kept")
    knee: int = Field(description="Kneedle's k on the full logits")
    kept_mass: float = Field(description="probability of all kept ids")
    turn: int | None = Field(
        description="which supervised answer of the conversation, from 0; null where unknown"
    )
    alternatives: list[Alternative] = Field(description="the most probable ids, the answer's or not")


class PeekedMessage(Part):
    """A turn of the conversation."""

    role: str
    text: str
    images: int = Field(description="how many stand in it")
    supervised: bool = Field(description="whether it is an answer whose tokens are in the cache")


class ImageSize(Part):
    """The pixels of an image as the data set has it, upright."""

    width: int
    height: int


class PeekedSample(Part):
    """A sample's answer tokens; `cachekd peek --json` prints a list of these."""

    key: str
    shard: str
    surprise: float = Field(description="mean of -logprob over the answer tokens, nats")
    tokens: list[PeekedToken]
    messages: list[PeekedMessage] | None = Field(description="null without the data")
    images: list[ImageSize] | None = Field(description="null without the data")
    paired: Paired | None = Field(None, description="null without --student")


def choose(cache: LogitCache, limit: int, order: Order, there: Container[str]) -> list[str]:
    """Keys to look at.

    Args:
        order: the first ones, or those at whose answers the teacher is the most surprised.
        there: which keys may be chosen.

    Raises:
        CachekdError: none may.
    """
    if order == "first":
        keys = list(islice((key for key in cache if key in there), limit))
    else:
        rows = (
            row for table in shard_tables(cache) for row in zip(table["logprob"], table["key"], strict=True)
        )
        found = ((logprob, place, key) for place, (logprob, key) in enumerate(rows) if key in there)
        keys = [key for _, _, key in heapq.nsmallest(limit, found)]
    if not keys:
        raise CachekdError(
            "the data set has none of the cache's samples",
            where=str(cache.path),
            expected=f"keys such as {next(iter(cache))!r}",
            fix="pass the data set that was dumped, read by the same --map and --key",
        )
    return keys


def peek(
    cache: LogitCache,
    key: str,
    *,
    text_of: Callable[[int], str] = lambda token: f"#{token}",
    sample: Sample | None = None,
    turns: list[int] | None = None,
    alternatives: int = ALTERNATIVES,
    student: PairedStudent | None = None,
) -> PeekedSample:
    """One sample.

    Args:
        text_of: a token's text.
        sample: with this key; its content is not checked here.
        turns: [N], the answer that each token is in.
        alternatives: how many per token, at most.
        student: whose tokens are laid beside the cache's.

    Raises:
        CachekdError: no such key, its shard is damaged, or `turns` are not as many as its tokens.
    """
    targets = cache[key]
    if turns is not None and len(turns) != len(targets):
        raise CachekdError(
            "the answer tokens differ from the cache's",
            where=f"sample {key!r} of {cache.path}",
            expected=f"{len(targets)} tokens",
            found=f"{len(turns)} tokens",
            fix="the data changed since the dump: run `cachekd dump` again",
        )
    tokens: list[PeekedToken] = []
    for rows in rows_of(targets):
        tokens += _tokens(targets.select(rows), text_of, turns and turns[len(tokens) :], alternatives)
    return PeekedSample(
        key=key,
        shard=cache.manifest.shards[cache.shard_of(key)].name,
        surprise=round(-sum(token.logprob for token in tokens) / max(1, len(tokens)), 5),
        tokens=tokens,
        messages=None if sample is None else [_message(message) for message in sample.messages],
        images=None
        if sample is None
        else [ImageSize(width=image.width, height=image.height) for image in sample.images],
        paired=student and student.beside(key, targets.token_ids.tolist(), sample, cut=_may_be_cut(cache)),
    )


def _may_be_cut(cache: LogitCache) -> bool:
    """Whether the ends of long answers may be missing."""
    return "cut" in {source.data.too_long for source in cache.manifest.sources}


def _message(message: dict[str, Any]) -> PeekedMessage:
    images = sum(part["type"] == "image" for part in message["content"])
    return PeekedMessage(
        role=message["role"],
        text=message_text(message),
        images=images,
        supervised=is_supervised(message),
    )


def _tokens(
    targets: CachedTargets, text_of: Callable[[int], str], turns: list[int] | None, alternatives: int
) -> Iterator[PeekedToken]:
    """Look at a few tokens, whose logprobs over the whole vocabulary are rebuilt at once."""
    rebuilt = targets.everywhere()
    answer = targets.token_ids[:, None]
    logprob = rebuilt.gather(-1, answer)
    rank = (rebuilt > logprob).sum(-1) + 1
    entropy, kept_mass = entropy_of(rebuilt), targets.logprobs.exp().sum(-1)
    top = rebuilt.topk(min(alternatives, rebuilt.shape[-1]))
    beyond: Origin = "spread" if isinstance(targets.tail, UniformTail) else "sketch"
    answer_kept, top_kept = _is_kept(targets, answer)[:, 0], _is_kept(targets, top.indices)
    for row in range(len(targets)):
        token = int(answer[row])
        yield PeekedToken(
            id=token,
            text=text_of(token),
            logprob=_rounded(logprob[row, 0]),
            origin="kept" if answer_kept[row] else beyond,
            rank=int(rank[row]),
            entropy=_rounded(entropy[row]),
            k=int(targets.k[row]),
            knee=int(targets.knee[row]),
            kept_mass=_rounded(kept_mass[row]),
            turn=None if turns is None else turns[row],
            alternatives=[
                Alternative(
                    id=one, text=text_of(one), logprob=round(value, 4), origin="kept" if kept else beyond
                )
                for one, value, kept in zip(
                    top.indices[row].tolist(), top.values[row].tolist(), top_kept[row].tolist(), strict=True
                )
                # Of ids with an even share none is more probable than another.
                if kept or beyond == "sketch"
            ],
        )


def _is_kept(targets: CachedTargets, ids: Tensor) -> Tensor:
    """[N, K] bool: which of `ids` [N, K] are stored."""
    return torch.stack([(targets.ids == column[:, None]).any(-1) for column in ids.T], -1)


def _rounded(value: Tensor) -> float:
    return round(float(value), 5)


LARGEST = 640  # pixels, of an image on a page
_SMALL = 128  # below that PNG is small, and exact


class PeekedData:
    """Samples by key.

    Args:
        cache: whose samples they are.
        samples: the data set.
        processor: that the cache was made with. It tells several answers apart; None: they are unknown.
    """

    def __init__(self, cache: LogitCache, samples: Samples, processor: Any = None) -> None:
        self.cache, self.samples = cache, samples
        self._places = {key: index for index, key in enumerate(samples.keys)}
        self._processor = processor

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Sample:
        """Read one sample.

        Raises:
            CachekdError: the data set lacks it, or it is not the one that the teacher saw.
            BadSample: it cannot be read.
        """
        if key not in self._places:
            raise CachekdError(
                f"the data set has no sample {key!r}",
                where=str(self.cache.path),
                expected=f"one of its {len(self.samples):,} keys, such as {self.samples.keys[0]!r}",
                fix="pass the data set that was dumped, read by the same --map and --key",
            )
        sample = self.samples[self._places[key]]
        check_content(self.cache, key, sample.content_hash)
        return sample

    def turns(self, sample: Sample) -> list[int] | None:
        """[N], which supervised answer each answer token is in, from 0; None where that is unknown.

        Raises:
            BadSample: the answers cannot be located.
        """
        if sum(map(is_supervised, sample.messages)) == 1:
            return [0] * len(self.cache[sample.key])
        if self._processor is None:
            return self._by_their_ends(sample)
        found: list[int] = SampleEncoder(self._processor).turns(sample).tolist()
        return found[: len(self.cache[sample.key])]  # the dump may have cut it

    def _by_their_ends(self, sample: Sample) -> list[int] | None:
        """As `turns`, by the end-of-turn tokens, where the cache says which that is."""
        vocabulary = self.cache.vocabulary
        if vocabulary is None or vocabulary.end_of_turn is None:
            return None
        ends = self.cache[sample.key].token_ids == vocabulary.end_of_turn
        found: list[int] = (ends.cumsum(0) - ends.long()).tolist()
        return found if max(found, default=0) < sum(map(is_supervised, sample.messages)) else None


def embedded(image: Image.Image) -> str:
    """An image as a page holds it: a data URI, at most LARGEST pixels a side."""
    small = image.copy()
    small.thumbnail((LARGEST, LARGEST))
    kind = "PNG" if max(small.size) <= _SMALL else "JPEG"
    stream = io.BytesIO()
    small.save(stream, format=kind, quality=85)
    content = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{content}"
