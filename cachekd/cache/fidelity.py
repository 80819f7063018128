"""How near is what a cache rebuilds to the teacher: on a shard's own tokens, measured while it is written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cachekd.cache.manifest import Fidelity, Header
from cachekd.cache.shard import read_shard
from cachekd.cache.sparse_logits import TailStates, TokenTargets
from cachekd.cache.tail.encoder import OutputHead
from cachekd.cache.tail.sketch import TailSketch
from cachekd.cache.targets import CachedTargets
from cachekd.losses.dbild import dbild_loss
from cachekd.losses.targets import DenseTargets, TeacherTargets

# The perturbed student's logits: the teacher's, and noise of this share of the deviation of its 128 largest.
NOISE = 0.5
ROWS = 64  # tokens at a time; each takes some [V] rows
MOST = 64  # tokens, evenly spread over the shard


def kl_to_rebuilt(live_logits: Tensor, targets: TeacherTargets) -> Tensor:
    """[N], KL(live || rebuilt) in nats; the rebuilt distribution is normalised first."""
    live, rebuilt = live_logits.float().log_softmax(-1), targets.everywhere().log_softmax(-1)
    return (live.exp() * (live - rebuilt).masked_fill(live.isneginf(), 0.0)).sum(-1)


@torch.enable_grad()
def loss_and_gradient(
    student_logits: Tensor, targets: TeacherTargets, *, window: int, min_k: int
) -> tuple[Tensor, Tensor]:
    """DBiLD [N] and its gradient [N, V] with respect to the student's logits."""
    student = student_logits.detach().float().requires_grad_()
    loss = dbild_loss(student, targets, window=window, min_k=min_k, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def gradient_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Compare gradients [N, V], token by token; returns [N]."""
    return torch.cosine_similarity(a, b, dim=-1, eps=1e-30)


def measure_fidelity(live_logits: Tensor, targets: CachedTargets) -> Fidelity:
    """Compare a cache with the teacher's logits [N, V] at the same N tokens."""
    generator = torch.Generator().manual_seed(0)
    kls, errors, cosines = [], [], []
    for some in torch.arange(len(targets)).split(ROWS):
        live, cached = live_logits[some].float(), targets.select(some)
        kept = cached.logprobs.isfinite()
        truth = live.log_softmax(-1).gather(-1, cached.ids.clamp(max=cached.vocab_size - 1))
        errors.append((truth - cached.logprobs)[kept].abs().max())
        kls.append(kl_to_rebuilt(live, cached))
        noise = torch.randn(live.shape, generator=generator).to(live.device)
        top = live.topk(min(128, live.shape[-1]), dim=-1).values.nan_to_num(neginf=0.0)
        student = live + NOISE * top.std(-1, keepdim=True) * noise
        gradients = [
            loss_and_gradient(student, either, window=targets.window, min_k=targets.min_k)[1]
            for either in (DenseTargets(live), cached)
        ]
        cosines.append(gradient_cosine(gradients[0], gradients[1]))
    return Fidelity(
        tokens=len(targets),
        kl=round(float(torch.cat(kls).mean()), 6),
        max_error=round(float(torch.stack(errors).max()), 6),
        cosine=round(float(torch.cat(cosines).mean()), 6),
    )


class FidelitySample:
    """A sample of a shard's tokens: one in 1, 2, 4, ... as the shard grows."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Tensor]] = []  # token, hidden state [d]
        self._seen, self._stride = 0, 1

    def add(self, first: int, states: TailStates) -> None:
        """Remember some of a sample's tokens; its first one is token `first` of the shard."""
        start = -self._seen % self._stride
        kept = states.hidden[start :: self._stride].cpu()  # one look at the device for all of them
        for place, state in enumerate(kept):
            self._kept.append((first + start + place * self._stride, state.clone()))
        self._seen += len(states)
        while len(self._kept) > MOST:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def measure(
        self,
        path: Path,
        sha256: str,
        header: Header,
        head: OutputHead,
        sketch: TailSketch | None,
    ) -> Fidelity | None:
        """Read the tokens back from the disk, and compare them with the head's logits.

        Args:
            path, sha256: of the shard.

        Returns:
            None where no state was added.
        """
        if not self._kept:
            return None
        shard = read_shard(path, header.codec.logprob_step, sketch=sketch is not None, sha256=sha256)
        hidden = torch.stack([state for _, state in self._kept])
        kept = TokenTargets.concatenate([shard.targets.cut(token, token + 1) for token, _ in self._kept])
        targets = CachedTargets.under(header, kept, sketch)
        return measure_fidelity(head.logits(hidden.to(head.weight.device)).cpu(), targets)
