"""Cached targets, as a loss asks for them, with one tail sketch or several; and their entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachekd.cache.manifest import Header
from cachekd.cache.sparse_logits import TokenTargets
from cachekd.cache.tail.merged import MergedTail, join_sketch_tails
from cachekd.cache.tail.sketch import SketchTail, TailSketch
from cachekd.errors import CachekdError
from cachekd.losses.kneedle import kneedle_k, widest

BLOCK = 2**24  # logprobs that are rebuilt at a time: 64 MB
_NOWHERE = 2**31 - 1  # an id that no token has
_MOST_PADDED = 2**29  # entries, 12 bytes each: one token of 65,535 must not make a million rows as long


@dataclass(frozen=True)
class UniformTail:
    """Spreads the mass that is not kept evenly over the ids that are not kept.

    Attributes:
        logprob: [N] float32, of each such id.
    """

    logprob: Tensor

    def everywhere(self, vocab_size: int) -> Tensor:
        """Repeat it for all ids, [N, V] float32."""
        return self.logprob[:, None].repeat(1, vocab_size)

    def gather(self, ids: Tensor) -> Tensor:
        """Repeat it [N, k] float32 at `ids` [N, k], none of which is kept."""
        return self.logprob[:, None].expand(ids.shape)

    def select(self, rows: Tensor) -> UniformTail:
        """Take some tokens."""
        return UniformTail(self.logprob[rows])

    def cat(self, others: list[UniformTail]) -> UniformTail:
        """Join this and others, one after the other."""
        return UniformTail(torch.cat([part.logprob for part in (self, *others)]))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> UniformTail:
        """A copy on `device`."""
        return UniformTail(self.logprob.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> UniformTail:
        """Copy it to page-locked memory, from which `to` need not block."""
        return UniformTail(self.logprob.pin_memory())


Tail = UniformTail | SketchTail | MergedTail


@dataclass(frozen=True)
class CachedTargets:
    """The teacher at N answer tokens, rebuilt from a cache (see `cachekd.losses.targets.TeacherTargets`).

    Attributes:
        token_ids: [N] int64.
        ids: [N, K] int64, kept ids in descending probability, then padding.
        logprobs: [N, K] float32 at `ids`; -inf in the padding.
        k: [N] int64, how many are kept.
        knee: [N] int64, Kneedle's k on the teacher's full logits.
        tail: the model of what is not kept.
        vocab_size, window, min_k: from the manifest.
    """

    token_ids: Tensor
    ids: Tensor
    logprobs: Tensor
    k: Tensor
    knee: Tensor
    tail: Tail
    vocab_size: int
    window: int
    min_k: int

    @classmethod
    def under(cls, header: Header, sparse: TokenTargets, sketch: TailSketch | None) -> CachedTargets:
        """Pad what a cache with this header stores; `sketch` is its own."""
        codec = header.codec
        return cls.from_sparse(
            sparse,
            vocab_size=header.teacher.vocab_size,
            window=codec.window,
            min_k=codec.min_k,
            sketch=sketch,
        )

    @classmethod
    def from_sparse(
        cls,
        sparse: TokenTargets,
        *,
        vocab_size: int,
        window: int,
        min_k: int,
        sketch: TailSketch | None = None,
    ) -> CachedTargets:
        """Pad flat entries to rows.

        Args:
            sketch: of the same cache, where the tokens have codes.
        """
        k = sparse.k.astype(np.int64)
        width = int(k.max(initial=1))
        if len(k) * width > _MOST_PADDED:
            raise CachekdError(
                "rows of one length would take too much memory",
                expected=f"at most {_MOST_PADDED:,} entries",
                found=f"{len(k):,} tokens, the longest of which has {width:,}",
                fix="cut it with `cachekd recompress --top-k`",
            )
        ids, logprobs = sparse.padded(_NOWHERE)
        tail: Tail
        if sketch is not None and sparse.sketch is not None:
            shape = (vocab_size, sparse.sketch.coordinates.shape[1])
            if shape != (sketch.vocab_size, sketch.axes):
                raise CachekdError(
                    "the tail sketch is not the one that the shards were coded with",
                    where=str(sketch.path),
                    expected=f"{shape[0]} ids, {shape[1]} axes",
                    found=f"{sketch.vocab_size} ids, {sketch.axes} axes",
                )
            tail = SketchTail.from_codes(sketch, sparse.sketch)
        else:
            others = np.log(np.maximum(vocab_size - k, 1))
            tail = UniformTail(torch.from_numpy((sparse.tail_logmass - others).astype(np.float32)))
        return cls(
            token_ids=torch.from_numpy(sparse.token_ids.astype(np.int64)),
            ids=torch.from_numpy(ids),
            logprobs=torch.from_numpy(logprobs),
            k=torch.from_numpy(k),
            knee=torch.from_numpy(sparse.knee.astype(np.int64)),
            tail=tail,
            vocab_size=vocab_size,
            window=window,
            min_k=min_k,
        )

    @classmethod
    def cat(cls, parts: Sequence[CachedTargets]) -> CachedTargets:
        """Join the parts' tokens, one after the other; all from one cache."""
        width = max(part.ids.shape[1] for part in parts)

        def rows(name: str, fill: float) -> Tensor:
            padded = [
                torch.nn.functional.pad(getattr(part, name), (0, width - part.ids.shape[1]), value=fill)
                for part in parts
            ]
            return torch.cat(padded)

        return replace(
            parts[0],
            token_ids=torch.cat([part.token_ids for part in parts]),
            ids=rows("ids", _NOWHERE),
            logprobs=rows("logprobs", float("-inf")),
            k=torch.cat([part.k for part in parts]),
            knee=torch.cat([part.knee for part in parts]),
            tail=_join([part.tail for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    def select(self, rows: Tensor) -> CachedTargets:
        """Take some tokens, by their indices [M] int64."""
        return self._each(lambda values: values[rows], self.tail.select(rows))

    def leading(self, window: int, min_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's own selection. With the dump's window it is exactly that of the dump. The dump's knee
        is stored, because Kneedle would find another one on a truncated list. With a smaller window Kneedle
        looks at the kept logprobs, as they are stored.

        Raises:
            CachekdError: the window is larger; or it is smaller, or min_k is larger, and some token has too
                few logprobs for it. The last is not checked on a GPU, because it would wait for all that was
                queued before.
        """
        own, asked = (min(each, self.vocab_size) for each in (self.window, window))
        needed = asked if asked < own else min_k if min_k > self.min_k else 0
        kept = int(self.k.min()) if needed and len(self) and self.k.device.type == "cpu" else needed
        if asked > own or kept < needed:
            raise CachekdError(
                "the cache was made with other Kneedle settings",
                expected=f"window {self.window} and min_k up to {self.min_k}, or less than {kept} of both",
                found=f"window {window} and min_k {min_k}",
                fix="use the cache's settings, or dump again with --window and --min-k",
            )
        knee = kneedle_k(self.logprobs[:, :asked]) if asked < own else self.knee
        k = torch.minimum(knee.clamp(min=min_k), self.k)
        width = widest(k, self.ids.shape[1])
        return self.ids[:, :width].clamp(max=self.vocab_size - 1), self.logprobs[:, :width], k

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k most probable ids [N, k] int64 and their logprobs [N, k] float32. They are the kept ones, as
        stored. For a token with fewer kept ones, they are those of its rebuilt distribution.
        """
        ids, logprobs = (
            torch.nn.functional.pad(kept[:, :k], (0, max(0, k - kept.shape[1])))
            for kept in (self.ids, self.logprobs)
        )
        lacking = (self.k < k).nonzero()[:, 0]
        if len(lacking):
            logprobs[lacking], ids[lacking] = self.select(lacking).everywhere().topk(k, dim=-1)
        return ids, logprobs

    def gather(self, ids: Tensor) -> Tensor:
        """Logprobs [N, k] float32 at `ids` [N, k] int64: kept ones as stored, others from the tail.

        Raises:
            CachekdError: another shape or dtype; or an id outside the vocabulary. The ids are not checked on
                a GPU, because it would wait for all that was queued before.
        """
        if ids.ndim != 2 or len(ids) != len(self) or ids.dtype != torch.int64:
            raise CachekdError(
                "ids do not fit the targets",
                expected=f"[{len(self)}, k] int64",
                found=f"{list(ids.shape)} {str(ids.dtype).removeprefix('torch.')}",
            )
        on_cpu = ids.device.type == "cpu"
        if on_cpu and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise CachekdError(
                "ids outside the teacher's vocabulary",
                expected=f"0 to {self.vocab_size - 1}",
                found=f"{int(ids.min())} to {int(ids.max())}",
                fix="slice a padded vocabulary: student_logits[:, : targets.vocab_size]",
            )
        ordered, order = self.ids.sort(-1)
        place = torch.searchsorted(ordered, ids.contiguous()).clamp(max=ordered.shape[1] - 1)
        kept = ordered.gather(-1, place) == ids
        stored = self.logprobs.gather(-1, order.gather(-1, place))
        return torch.where(kept, stored, self.tail.gather(ids))

    def everywhere(self) -> Tensor:
        """[N, V] float32: `gather` at every id, at the price of a matrix product."""
        tail = self.tail.everywhere(self.vocab_size)
        # Padding has an id beyond the vocabulary; it goes into a column that is cut off.
        wide = torch.nn.functional.pad(tail, (0, 1))
        return wide.scatter(-1, self.ids.clamp(max=self.vocab_size), self.logprobs)[:, :-1]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CachedTargets:
        """A copy on `device`."""
        tail = self.tail.to(device, non_blocking=non_blocking)
        return self._each(lambda values: values.to(device, non_blocking=non_blocking), tail)

    def pin_memory(self) -> CachedTargets:
        """Copy it to page-locked memory, from which `to` need not block; a DataLoader looks for this name."""
        return self._each(Tensor.pin_memory, self.tail.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor], tail: Tail) -> CachedTargets:
        names = ("token_ids", "ids", "logprobs", "k", "knee")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed, tail=tail)


def _join(tails: list[Tail]) -> Tail:
    """Join tails, one after the other; a cache has a sketch for all its tokens, or for none."""
    uniform = [tail for tail in tails if isinstance(tail, UniformTail)]
    if uniform:
        return uniform[0].cat(uniform[1:])
    return join_sketch_tails([tail for tail in tails if not isinstance(tail, UniformTail)])


def entropy(targets: CachedTargets) -> Tensor:
    """[N] float64, nats, of the rebuilt distributions; with a tail sketch at the price of rebuilding them."""
    if isinstance(targets.tail, UniformTail):
        return entropy_bounds(targets)[1]
    parts = [entropy_of(targets.select(rows).everywhere()) for rows in rows_of(targets)]
    return torch.cat(parts).double() if parts else torch.empty(0, dtype=torch.float64)


def entropy_bounds(targets: CachedTargets) -> tuple[Tensor, Tensor]:
    """Between what the entropy of each token's distribution lies, from the kept entries alone.

    Returns:
        [N] float64, nats, twice. Least: all that is not kept is one more id. Most: it is spread evenly, as
        `UniformTail` has it, whose entropy this is exactly.
    """
    kept = targets.logprobs.double().exp()
    beyond = (1 - kept.sum(-1)).clamp(min=0)
    least = (torch.special.entr(kept).sum(-1) + torch.special.entr(beyond)).clamp(min=0)
    others = (targets.vocab_size - targets.k).clamp(min=1).double()
    return least, least + beyond * others.log()


def entropy_of(logprobs: Tensor) -> Tensor:
    """[N] nats, from rebuilt logprobs [N, V], which need not be quite normalised."""
    # A row of 152 k takes one exp and two passes this way, and softmax, log and product another.
    centred = (logprobs - logprobs.amax(-1, keepdim=True)).clamp_(min=-1e4)  # -inf times 0 is not 0
    weights = centred.exp()
    mass = weights.sum(-1)
    return mass.log() - torch.einsum("nv,nv->n", weights, centred) / mass


def rows_of(targets: CachedTargets) -> tuple[Tensor, ...]:
    """All tokens' indices, in runs whose logprobs over the whole vocabulary fit into memory."""
    return torch.arange(len(targets)).split(max(1, BLOCK // targets.vocab_size))
