"""DBiLD against a slow reference that forms every pair, in float64, value and gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachekd.errors import CachekdError
from cachekd.losses import bild_loss, dbild_loss, kneedle_k
from cachekd.losses.dbild import pairwise_reverse_kl
from cachekd.losses.targets import DenseTargets


def slow_knee(values: list[float]) -> int:
    """Entries up to the knee of a descending curve, from the definition."""
    values = [value for value in values if math.isfinite(value)]
    if not values or values[0] == values[-1]:
        return min(1, len(values))
    scores = []
    for i, value in enumerate(values):
        x = i / (len(values) - 1)
        y = (value - values[-1]) / (values[0] - values[-1])
        scores.append((1 - x) - y)
    return scores.index(max(scores)) + 1


def slow_half(
    led_by: Tensor, student: Tensor, teacher: Tensor, window: int, min_k: int, temperature: float
) -> Tensor:
    """One half of the loss for one token, every pair formed."""
    values, order = led_by.detach().sort(descending=True, stable=True)
    values = values[:window]
    finite = int(values.isfinite().sum())
    k = min(max(slow_knee(values.tolist()), min_k), finite)
    if k < 2:
        return student.sum() * 0
    ids = order[:k].tolist()
    i, j = map(list, zip(*itertools.combinations(ids, 2), strict=True))
    d_student = (student[i] - student[j]) / temperature
    d_teacher = (teacher[i] - teacher[j]) / temperature
    log_p, log_q = d_student.log_softmax(0), d_teacher.log_softmax(0)
    return (log_p.exp() * (log_p - log_q)).sum()


def slow_dbild(
    student: Tensor, teacher: Tensor, window=128, min_k=2, temperature=3.0, direction="both"
) -> Tensor:
    rows = []
    for s, t in zip(student, teacher, strict=True):
        halves = {"teacher": t, "student": s}
        leaders = [leader for name, leader in halves.items() if direction in ("both", name)]
        rows.append(sum(slow_half(leader, s, t, window, min_k, temperature) for leader in leaders))
    return torch.stack(rows)


def random_logits(rows: int, vocab: int, seed: int, scale: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("direction", ["both", "teacher", "student"])
@pytest.mark.parametrize(("vocab", "window", "min_k"), [(2, 128, 2), (9, 128, 2), (40, 16, 4), (60, 60, 60)])
@pytest.mark.parametrize("temperature", [0.5, 3.0, 20.0])
def test_value_and_gradient_equal_the_pairwise_form(direction, vocab, window, min_k, temperature):
    student, teacher = random_logits(6, vocab, 0).requires_grad_(), random_logits(6, vocab, 1)
    options = {"window": window, "min_k": min_k, "temperature": temperature, "direction": direction}
    ours = dbild_loss(student, DenseTargets(teacher), reduction="none", **options)
    slow = slow_dbild(student, teacher, **options)
    torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-12)
    (ours_gradient,) = torch.autograd.grad(ours.sum(), student)
    (slow_gradient,) = torch.autograd.grad(slow.sum(), student)
    torch.testing.assert_close(ours_gradient, slow_gradient, rtol=1e-9, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    vocab=st.integers(2, 12),
    rows=st.integers(1, 4),
    window=st.integers(2, 14),
    data=st.data(),
    temperature=st.floats(0.05, 50),
)
def test_ties_and_minus_infinity_equal_the_pairwise_form(vocab, rows, window, data, temperature):
    """Few distinct values, so that ties are everywhere; the reference resolves them as the loss does."""
    grid = st.sampled_from([-8.0, -2.5, 0.0, 0.0, 1.0, 3.0, float("-inf")])
    matrix = st.lists(st.lists(grid, min_size=vocab, max_size=vocab), min_size=rows, max_size=rows)
    student = torch.tensor(data.draw(matrix), dtype=torch.float64)
    teacher = torch.tensor(data.draw(matrix), dtype=torch.float64)
    for logits in (student, teacher):
        logits[:, 0] = torch.where(logits.isfinite().any(-1), logits[:, 0], 0.0)
    student.requires_grad_()
    loss = dbild_loss(
        student, DenseTargets(teacher), window=window, temperature=temperature, reduction="none"
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    assert (loss > -1e-9).all()
    distinct = all(len(set(row)) == vocab for row in [*student.tolist(), *teacher.tolist()])
    if distinct and student.isfinite().all() and teacher.isfinite().all():
        slow = slow_dbild(student, teacher.log_softmax(-1), window=window, temperature=temperature)
        torch.testing.assert_close(loss, slow, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_nan(temperature, scale, dtype):
    student = random_logits(5, 50, 0, scale).to(dtype).requires_grad_()
    teacher = random_logits(5, 50, 1, scale).to(dtype)
    loss = dbild_loss(student, DenseTargets(teacher), temperature=temperature)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_float32_is_close_to_float64_on_a_confident_teacher(temperature):
    student, teacher = random_logits(50, 300, 0, 6.0), random_logits(50, 300, 1, 6.0)
    teacher[:, 7] += 30
    exact = dbild_loss(student, DenseTargets(teacher), temperature=temperature, reduction="none")
    single = dbild_loss(
        student.float(), DenseTargets(teacher.float()), temperature=temperature, reduction="none"
    )
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)


def test_columns_beyond_every_k_change_nothing(monkeypatch):
    """On a GPU none are cut off: a look at the largest k would wait."""
    generator = torch.Generator().manual_seed(3)
    logits, teacher = 3 * torch.randn(2, 7, 200, generator=generator, dtype=torch.float64)
    results = []
    for cut in (True, False):
        if not cut:
            monkeypatch.setattr("cachekd.losses.kneedle.widest", lambda k, width: width)
        student = logits.clone().requires_grad_()
        loss = dbild_loss(student, DenseTargets(teacher), window=64, reduction="none")
        results.append((loss, *torch.autograd.grad(loss.sum(), student)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_bfloat16_autocast_computes_in_float32():
    student, teacher = random_logits(8, 60, 0).float(), random_logits(8, 60, 1).float()
    plain = dbild_loss(student, DenseTargets(teacher))
    with torch.autocast("cpu", torch.bfloat16):
        cast = dbild_loss(student, DenseTargets(teacher))
    assert torch.equal(plain, cast)


def test_gradcheck_of_the_linear_form():
    student, teacher = random_logits(4, 7, 0).requires_grad_(), random_logits(4, 7, 1)
    k = torch.tensor([2, 7, 5, 3])
    assert torch.autograd.gradcheck(lambda s: pairwise_reverse_kl(s, teacher, k, 3.0), (student,))


def test_equals_bild_with_the_roles_exchanged():
    """With k fixed, forward KL of (teacher, student) is reverse KL of (student, teacher)."""
    one, other = random_logits(6, 30, 0), random_logits(6, 30, 1)
    fixed = {"window": 10, "min_k": 10}
    ours = dbild_loss(one, DenseTargets(other), reduction="none", **fixed)
    bild = bild_loss(other, DenseTargets(one), k=10, reduction="none")
    torch.testing.assert_close(ours, bild, rtol=1e-9, atol=1e-11)


def test_both_is_the_sum_of_the_halves_and_reductions_agree():
    student, targets = random_logits(6, 30, 0), DenseTargets(random_logits(6, 30, 1))
    parts = [
        dbild_loss(student, targets, direction=name, reduction="none") for name in ("teacher", "student")
    ]
    whole = dbild_loss(student, targets, reduction="none")
    torch.testing.assert_close(whole, sum(parts))
    torch.testing.assert_close(dbild_loss(student, targets, reduction="sum"), whole.sum())
    torch.testing.assert_close(dbild_loss(student, targets), whole.mean())


def test_a_constant_per_row_changes_nothing():
    student, teacher = random_logits(6, 30, 0), random_logits(6, 30, 1)
    shifted = dbild_loss(student + 100 * random_logits(6, 1, 2), DenseTargets(teacher - 7), reduction="none")
    plain = dbild_loss(student, DenseTargets(teacher), reduction="none")
    torch.testing.assert_close(shifted, plain, rtol=1e-8, atol=1e-10)


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient():
    logits = random_logits(6, 30, 0)
    student = logits.clone().requires_grad_()
    loss = dbild_loss(student, DenseTargets(logits))
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12


def test_padding_after_k_does_not_matter():
    student, teacher, k = random_logits(3, 9, 0), random_logits(3, 9, 1), torch.tensor([4, 9, 2])
    expected = pairwise_reverse_kl(student, teacher, k, 3.0)
    junk = torch.arange(9) >= k[:, None]
    changed = pairwise_reverse_kl(
        student.masked_fill(junk, 1e9), teacher.masked_fill(junk, float("-inf")), k, 3.0
    )
    assert torch.equal(expected, changed)


def test_no_tokens_is_a_zero_with_a_gradient():
    student = torch.zeros(0, 5, requires_grad=True)
    for reduction in ("mean", "sum"):
        loss = dbild_loss(student, DenseTargets(torch.zeros(0, 5)), reduction=reduction)
        loss.backward()
        assert loss.item() == 0


def test_an_id_the_teacher_excludes_pushes_the_student_off_it():
    """-inf at the teacher is a large finite difference: the student-led half says so, finitely."""
    teacher = torch.tensor([[2.0, 1.0, 0.5, float("-inf")]])
    student = torch.tensor([[0.0, 0.0, 0.0, 5.0]], requires_grad=True)
    dbild_loss(student, DenseTargets(teacher)).backward()
    assert student.grad[0, 3] > 0
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"min_k": 1}, "min_k"),
        ({"window": 2, "min_k": 3}, "min_k"),
        ({"direction": "up"}, "unknown direction"),
        ({"reduction": "max"}, "unknown reduction"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(CachekdError, match=message):
        dbild_loss(torch.zeros(2, 5), DenseTargets(torch.zeros(2, 5)), **changes)


@pytest.mark.parametrize("shape", [(2, 6), (3, 5)])
def test_shapes_that_do_not_match_are_refused(shape):
    with pytest.raises(CachekdError, match="do not match") as caught:
        dbild_loss(torch.zeros(shape), DenseTargets(torch.zeros(2, 5)))
    assert "[2, 5]" in str(caught.value)


# ---- Kneedle


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), st.integers(0, 3))
def test_kneedle_equals_its_definition(values, infinities):
    values = sorted(values, reverse=True)
    row = torch.tensor([values + [float("-inf")] * infinities], dtype=torch.float64)
    expected = slow_knee(values)
    found = int(kneedle_k(row))
    if found != expected:  # two points equally far below the chord, up to rounding
        x = [i / max(1, len(values) - 1) for i in range(len(values))]
        span = values[0] - values[-1] or 1.0
        score = [(1 - a) - (b - values[-1]) / span for a, b in zip(x, values, strict=True)]
        assert score[found - 1] == pytest.approx(score[expected - 1], abs=1e-5)


def test_kneedle_finds_the_elbow_of_the_papers_figure():
    """A few large logits, then a long shallow tail: the knee is where the tail begins."""
    curve = torch.tensor([[10.0, 9.0, 8.0] + [2.0 - 0.01 * i for i in range(50)]])
    assert int(kneedle_k(curve)) == 4


def test_kneedle_of_flat_concave_and_empty_rows():
    flat, concave = torch.ones(1, 6), -(torch.arange(6.0)[None] ** 2)
    assert kneedle_k(flat).tolist() == [1]
    assert kneedle_k(concave).tolist() == [1]
    assert kneedle_k(torch.full((1, 4), float("-inf"))).tolist() == [0]
    assert kneedle_k(torch.zeros(2, 1)).tolist() == [1, 1]
