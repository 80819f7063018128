"""The baselines against PyTorch's own, and against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.errors import CachekdError
from cachekd.losses import bild_loss, cross_entropy_loss, forward_kl_loss, reverse_kl_loss, topk_kl_loss
from cachekd.losses.targets import DenseTargets


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7, 40, generator=generator) * 3 for _ in range(2)]


def test_cross_entropy_is_torchs(logits):
    student, _ = logits
    ids = torch.arange(7)
    torch.testing.assert_close(cross_entropy_loss(student, ids), F.cross_entropy(student, ids))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_torchs_in_both_directions(logits, temperature):
    student, teacher = logits
    p, q = (F.log_softmax(x / temperature, -1) for x in (teacher, student))
    forward = F.kl_div(q, p, log_target=True, reduction="batchmean")
    reverse = F.kl_div(p, q, log_target=True, reduction="batchmean")
    torch.testing.assert_close(
        forward_kl_loss(student, DenseTargets(teacher), temperature=temperature), forward
    )
    torch.testing.assert_close(
        reverse_kl_loss(student, DenseTargets(teacher), temperature=temperature), reverse
    )


def test_topk_kl_is_bounded_by_the_whole_and_reaches_it(logits):
    """Merging outcomes never increases a KL; with all of them kept it is the whole."""
    student, teacher = logits
    whole = forward_kl_loss(student, DenseTargets(teacher), reduction="none")
    last = torch.zeros(7)
    for k in (1, 3, 10, 39, 40):
        now = topk_kl_loss(student, DenseTargets(teacher), k=k, reduction="none")
        assert (now >= last - 1e-5).all()
        last = now
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 60), k=st.integers(2, 12))
def test_all_are_finite_and_not_negative(seed, scale, k):
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(3, 12, generator=generator) * scale).requires_grad_()
    teacher = torch.randn(3, 12, generator=generator) * scale
    teacher[0, 3] = float("-inf")
    targets = DenseTargets(teacher)
    losses = [
        forward_kl_loss(student, targets, reduction="none"),
        reverse_kl_loss(student, targets, reduction="none")[1:],
        topk_kl_loss(student, targets, k=k, reduction="none"),
        bild_loss(student, targets, k=k, reduction="none"),
    ]
    for loss in losses:
        assert loss.isfinite().all()
        assert (loss > -1e-4).all()
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert gradient.isfinite().all()


def test_bild_is_the_published_form():
    """One token, k = 3, written out: softmax over the three differences of the upper triangle."""
    teacher, student = torch.tensor([[3.0, 1.0, 0.0, -9.0]]), torch.tensor([[2.0, 1.5, 0.0, -9.0]])

    def differences(z: torch.Tensor) -> torch.Tensor:
        return torch.stack([z[0, 0] - z[0, 1], z[0, 0] - z[0, 2], z[0, 1] - z[0, 2]]) / 3.0

    half = F.kl_div(
        differences(student).log_softmax(0),
        differences(teacher).log_softmax(0),
        log_target=True,
        reduction="sum",
    )
    torch.testing.assert_close(bild_loss(student, DenseTargets(teacher), k=3), 2 * half)  # both lead alike


def test_k_out_of_range_is_refused(logits):
    with pytest.raises(CachekdError, match="k is out of range"):
        topk_kl_loss(logits[0], DenseTargets(logits[1]), k=41)
