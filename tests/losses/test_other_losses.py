"""The losses beside DBiLD against PyTorch's own, against slow references in float64, and each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.config.losses import LOSSES
from cachekd.errors import CachekdError
from cachekd.losses import (
    bild_loss,
    cross_entropy_loss,
    forward_kl_loss,
    jsd_loss,
    loss_function,
    mse_loss,
    reverse_kl_loss,
    topk_kl_loss,
)
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


# ---- slow references: token by token, id by id


def softmax(values: list[float], temperature: float) -> list[float]:
    largest = max(values)
    weights = [math.exp((value - largest) / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def slow_jsd(student: list[float], teacher: list[float], beta: float, temperature: float) -> float:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    mixture = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * divergence(p, mixture) + (1 - beta) * divergence(q, mixture)


def slow_mse(student: list[float], teacher: list[float]) -> float:
    centred = [[z - sum(side) / len(side) for z in side] for side in (student, teacher)]
    return sum((a - b) ** 2 for a, b in zip(*centred, strict=True)) / len(student)


def slow_topk_kl(student: list[float], teacher: list[float], k: int, temperature: float) -> float:
    ids = sorted(range(len(teacher)), key=lambda i: -teacher[i])[:k]
    sides = []
    for side in (teacher, student):
        p = softmax(side, 1.0)
        kept = [p[i] for i in ids]
        sides.append(softmax([math.log(x) for x in (*kept, 1 - sum(kept))], temperature))
    return divergence(*sides)


def slow_bild(student: list[float], teacher: list[float], k: int, temperature: float) -> float:
    total = 0.0
    for leader in (teacher, student):
        ids = sorted(range(len(leader)), key=lambda i: -leader[i])[:k]
        pairs = list(itertools.combinations(ids, 2))
        p, q = (softmax([side[i] - side[j] for i, j in pairs], temperature) for side in (teacher, student))
        total += divergence(p, q)
    return total


REFERENCES = [
    (jsd_loss, slow_jsd, {"beta": 0.5, "temperature": 1.0}),
    (jsd_loss, slow_jsd, {"beta": 0.1, "temperature": 3.0}),
    (mse_loss, slow_mse, {}),
    (topk_kl_loss, slow_topk_kl, {"k": 5, "temperature": 1.0}),
    (topk_kl_loss, slow_topk_kl, {"k": 9, "temperature": 2.5}),
    (bild_loss, slow_bild, {"k": 2, "temperature": 3.0}),
    (bild_loss, slow_bild, {"k": 6, "temperature": 0.7}),
]


@pytest.mark.parametrize(("loss", "slow", "how"), REFERENCES)
def test_value_and_gradient_equal_the_definition(logits, loss, slow, how):
    """The gradient against differences of the reference."""
    student, teacher = (x.double()[:3, :12] for x in logits)
    student = student.clone().requires_grad_()
    found = loss(student, DenseTargets(teacher), reduction="none", **how)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    assert found.tolist() == pytest.approx([slow(*row, **how) for row in rows], rel=1e-9)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    for row, id_ in ((0, 0), (1, 7), (2, 11)):
        shifted = [list(rows[row][0]) for _ in range(2)]
        shifted[0][id_] += 1e-5
        shifted[1][id_] -= 1e-5
        ahead, behind = (slow(values, rows[row][1], **how) for values in shifted)
        assert gradient[row, id_].item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-4, abs=1e-8)


def test_jsd_tends_to_both_kls(logits):
    """GKD, section 2: divided by its share, as that tends to 0."""
    student, teacher = logits[0].double(), DenseTargets(logits[1].double())
    forward = jsd_loss(student, teacher, beta=1e-8, reduction="none") / 1e-8
    torch.testing.assert_close(
        forward, forward_kl_loss(student, teacher, reduction="none"), rtol=1e-3, atol=0
    )
    reverse = jsd_loss(student, teacher, beta=1 - 1e-8, reduction="none") / 1e-8
    torch.testing.assert_close(
        reverse, reverse_kl_loss(student, teacher, reduction="none"), rtol=1e-3, atol=0
    )


def test_mse_leaves_out_what_is_never_said(logits):
    """And a constant for each token is nothing."""
    student, teacher = (x.double() for x in logits)
    excluded = teacher.clone()
    excluded[:, 3] = float("-inf")
    kept = [i for i in range(40) if i != 3]
    found = mse_loss(student + torch.randn(7, 1), DenseTargets(excluded), reduction="none")
    expected = mse_loss(student[:, kept], DenseTargets(teacher[:, kept]), reduction="none")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0.01, 60),
    temperature=st.floats(0.05, 50),
    never=st.booleans(),
)
def test_every_loss_is_finite_not_negative_and_0_at_the_teacher(name, seed, scale, temperature, never):
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(3, 80, generator=generator) * scale).requires_grad_()
    teacher = torch.randn(3, 80, generator=generator) * scale
    if never and name != "reverse_kl":  # which is infinite there
        teacher[0, 3] = float("-inf")
    how = LOSSES[name](loss=name).arguments({"temperature": temperature})
    loss = loss_function(name)(student, DenseTargets(teacher), reduction="none", **how)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (loss > -1e-3).all()
    if not never:
        same = loss_function(name)(teacher, DenseTargets(teacher), reduction="none", **how)
        assert (same.abs() <= 1e-4 * max(1.0, scale / temperature)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_computed_in_full_precision_and_reduced_alike(logits, name):
    student, teacher = logits[0].repeat(1, 2), DenseTargets(logits[1].repeat(1, 2) + torch.rand(80))
    loss = loss_function(name)
    each = loss(student, teacher, reduction="none")
    assert each.shape == (7,)
    torch.testing.assert_close(loss(student, teacher, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(student, teacher), each.mean())
    assert loss(student[:0], teacher.select(torch.arange(0)), reduction="sum").item() == 0
    half = loss(student.bfloat16(), teacher, reduction="none")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(student.bfloat16().float(), teacher, reduction="none"))
    with pytest.raises(CachekdError, match="do not match"):
        loss(student[:, :-1], teacher)


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


@pytest.mark.parametrize("loss", [forward_kl_loss, reverse_kl_loss, jsd_loss, topk_kl_loss, bild_loss])
def test_a_temperature_of_0_is_refused(logits, loss):
    with pytest.raises(CachekdError, match="temperature must be positive"):
        loss(logits[0], DenseTargets(logits[1]), temperature=0.0)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_mixture_of_one_side_is_refused(logits, beta):
    with pytest.raises(CachekdError, match="beta is out of range"):
        jsd_loss(logits[0], DenseTargets(logits[1]), beta=beta)
