"""Losses over cells against sums in plain Python; where cells are the ids, against the plain losses."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from cachekd.cache.roundtrip import roundtrip
from cachekd.config.losses import LOSSES
from cachekd.errors import CachekdError
from cachekd.losses import dbild_loss, kneedle_k, loss_function, summed_over_chunks
from cachekd.losses.cells import Cells, CellTargets, OverCells
from cachekd.losses.chunked import LiveTargets
from cachekd.losses.targets import DenseTargets
from cachekd.vocabulary import CellMap, TokenBytes
from caches import model_states, token_ids
from second_device import second_device, waits
from vocabularies import fast, smollm2

NEVER = float("-inf")
each_loss = pytest.mark.parametrize("name", LOSSES)


def map_of(teacher: list[int], student: list[int], cells: int) -> CellMap:
    return CellMap(np.array(teacher, np.int32), np.array(student, np.int32), cells, cells)


def random_map(teacher: int, student: int, cells: int, seed: int, *, left_out: bool = True) -> CellMap:
    """Cells with a member on each side at least, many with one and a few with very many."""
    generator = np.random.default_rng(seed)
    sides = []
    for size in (teacher, student):
        others = np.minimum(generator.geometric(3 / cells, size - cells) - 1, cells - 1)
        if left_out:
            others[generator.random(len(others)) < 0.1] = -1
        sides.append(generator.permutation(np.concatenate([np.arange(cells), others])))
    return map_of(*(side.tolist() for side in sides), cells)


def random_logits(rows: int, size: int, seed: int, scale: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64) * scale


def over_cells(targets, cells: Cells) -> CellTargets:
    return OverCells(targets, cells).select(torch.arange(len(targets)))


# ---- slow references: row by row, cell by cell


def slow_sums(row: list[float], cell_of: list[int], cells: int) -> list[float]:
    """The log of the sum of exp, of each cell."""
    found = []
    for cell in range(cells):
        members = [value for value, own in zip(row, cell_of, strict=True) if own == cell]
        most = max(members, default=NEVER)
        total = 0.0 if most == NEVER else math.fsum(math.exp(value - most) for value in members)
        found.append(most + math.log(total) if total else NEVER)
    return found


def slow_merge(logits: Tensor, cell_of: np.ndarray, cells: int) -> Tensor:
    rows = [slow_sums(row, cell_of.tolist(), cells) for row in logits.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def slow_student(logits: Tensor, cell_of: np.ndarray, cells: int) -> Tensor:
    """The same in PyTorch, for its gradient; every number finite."""
    groups = [torch.from_numpy((cell_of == cell).nonzero()[0]) for cell in range(cells)]
    return torch.stack([logits[:, members].logsumexp(-1) for members in groups], -1)


def slow_half(ids: list[int], student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of DBiLD for one token, at the leader's cells, every pair formed."""
    if len(ids) < 2:
        return student.sum() * 0
    left, right = map(list, zip(*itertools.combinations(ids, 2), strict=True))
    p, q = (((z[left] - z[right]) / temperature).log_softmax(0) for z in (student, teacher))
    return (p.exp() * (p - q)).sum()


def slow_dbild(logits: Tensor, teacher: Tensor, cells: CellMap, temperature: float) -> Tensor:
    """The teacher leads with the cells of its own leading ids; the student with its leading cells."""
    student = slow_student(logits, cells.student, cells.cells)
    merged = slow_merge(teacher.log_softmax(-1), cells.teacher, cells.cells)
    rows = []
    for s, t, own in zip(student, merged, teacher, strict=True):
        values, ids = own.sort(descending=True)
        k = max(2, int(kneedle_k(values[None, :128])))
        led = {int(cells.teacher[i]) for i in ids[:k]} - {-1}
        values, order = s.detach().sort(descending=True)
        k = max(2, int(kneedle_k(values[None, :128])))
        halves = (sorted(led, key=lambda cell: -float(t[cell])), order[:k].tolist())
        rows.append(sum(slow_half(ids, s, t, temperature) for ids in halves))
    return torch.stack(rows)


# ---- merging


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 60),
    cells=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 5.0, 300.0]),
    never=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_any_sums_are_pythons_and_never_nan(size, cells, seed, scale, never, dtype):
    """Of any map, cells without a member among them, and of numbers that lie hundreds apart."""
    generator = torch.Generator().manual_seed(seed)
    cell_of = torch.randint(-1, cells, (size,), generator=generator).numpy().astype(np.int32)
    logits = torch.randn(3, size, generator=generator) * scale
    logits[torch.rand(logits.shape, generator=generator) < never] = NEVER
    logits = logits.to(dtype).requires_grad_()
    found = Cells.of(map_of(list(range(cells)), cell_of.tolist(), cells)).of_student(logits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    present, cell_of = np.unique(cell_of[cell_of >= 0]), cell_of.tolist()
    expected = slow_merge(logits, np.array(cell_of), cells)[:, present]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    alone = [cell_of.count(cell) == 1 for cell in present]
    assert torch.equal(found[:, alone].double(), expected[:, alone])  # to the bit
    above = torch.randn(found.shape, generator=generator).to(found)
    (gradient,) = torch.autograd.grad(found, logits, above)
    assert gradient.dtype == dtype
    shares = torch.zeros(3, size, dtype=torch.float64)
    for column, cell in enumerate(present):
        for place in (number for number, own in enumerate(cell_of) if own == cell):
            off = (logits[:, place].double() - expected[:, column]).nan_to_num(nan=NEVER)
            shares[:, place] = off.exp() * above[:, column]
    # A share is e to a difference of two numbers, of which float32 rounds a thousand to 4e-5.
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 13, torch.float64: 40}[dtype]
    torch.testing.assert_close(gradient.double(), shares, rtol=2.0**-bits, atol=1e-6)


def test_a_cell_far_below_the_largest_logit_is_not_lost():
    """e**-500 is 0 in float32, and so would be a sum that takes out the row's largest."""
    logits = torch.tensor([[0.0, -500.0, -501.0, -1000.0]], requires_grad=True)
    merged = Cells.of(map_of([0, 1, 2], [0, 1, 1, 2], 3)).of_student(logits)
    assert merged[0].tolist() == pytest.approx([0, -500 + math.log1p(math.exp(-1)), -1000], rel=1e-7)
    (gradient,) = torch.autograd.grad(merged[0, 1], logits)
    one = 1 / (1 + math.exp(-1))
    assert gradient[0].tolist() == pytest.approx([0, one, 1 - one, 0], rel=1e-5)


def test_a_cell_that_is_never_said_has_no_gradient():
    logits = torch.tensor([[0.0, NEVER, NEVER, 1.0]], requires_grad=True)
    merged = Cells.of(map_of([0, 1], [0, 1, 1, 0], 2)).of_student(logits)
    assert merged[0, 1] == NEVER
    dbild_loss(merged, DenseTargets(torch.tensor([[0.0, 1.0]]))).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1:3].tolist() == [0, 0]


@pytest.mark.parametrize("most", [1, 700, 10**9])
def test_rows_at_a_time_change_nothing(monkeypatch, most):
    cells = Cells.of(random_map(60, 300, 40, 0))
    logits = random_logits(7, 300, 1).float().requires_grad_()
    found = cells.of_student(logits)
    (gradient,) = torch.autograd.grad(found, logits, found.detach())
    monkeypatch.setattr("cachekd.losses.merge.at_a_time", lambda device: most)
    again = cells.of_student(logits)
    torch.testing.assert_close(again, found)
    torch.testing.assert_close(torch.autograd.grad(again, logits, again.detach())[0], gradient)


def test_columns_that_pad_a_vocabulary_are_nobodys_and_ids_beyond_the_logits_are_never_said():
    cells = random_map(60, 300, 40, 0)
    wide = random_logits(4, 310, 1).float().requires_grad_()
    merged = Cells.of(cells).of_student(wide)
    assert torch.equal(merged, Cells.of(cells).of_student(wide[:, :300]))
    (gradient,) = torch.autograd.grad(merged.sum(), wide)
    assert gradient[:, 300:].abs().max() == 0
    torch.testing.assert_close(gradient.sum(-1), torch.full((4,), 40.0))
    more = replace(cells, student=np.append(cells.student, [0, -1, 3]).astype(np.int32))
    torch.testing.assert_close(Cells.of(more).of_student(wide[:, :300]), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_a_device_and_all_of_it_is_there(dtype):
    cells, (student, teacher) = random_map(60, 300, 40, 0), (random_logits(5, n, n) for n in (300, 60))
    student = student.to(dtype)

    def step(device: torch.device) -> tuple[Tensor, Tensor]:
        there = student.to(device).requires_grad_()
        here = OverCells(DenseTargets(teacher.float().to(device)), Cells.of(cells).to(device))
        rows = torch.arange(5, device=device)
        before = waits()
        loss = dbild_loss(here.cells.of_student(there), here.select(rows), reduction="none")
        found = loss, torch.autograd.grad(loss.sum(), there)[0]
        assert waits() == before
        return found

    with second_device() as device:
        ours = [each.cpu() for each in step(device)]
    for one, other in zip(ours, step(torch.device("cpu")), strict=True):
        torch.testing.assert_close(one, other)


# ---- a teacher


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), never=st.booleans())
def test_a_teachers_cells_hold_all_that_is_not_left_out(seed, never):
    cells, logits = random_map(60, 50, 12, seed), random_logits(4, 60, seed)
    if never:
        logits[torch.rand(4, 60, generator=torch.Generator().manual_seed(seed)) < 0.3] = NEVER
    logits[:, 7] = 1.0
    answers = torch.tensor([3, 7, 58, 11])
    found = over_cells(DenseTargets(logits, answers), Cells.of(cells))
    expected = slow_merge(logits, cells.teacher, 12).log_softmax(-1)
    if np.any(cells.teacher[7] >= 0):
        torch.testing.assert_close(found.everywhere().exp().sum(-1), torch.ones(4).double())
        torch.testing.assert_close(found.everywhere(), expected)
    assert not found.everywhere().isnan().any()
    assert found.token_ids.tolist() == cells.teacher[answers].tolist()
    assert (len(found), found.vocab_size, found.window, found.min_k) == (4, 12, 128, 2)
    ids = torch.tensor([[0, 5], [11, 3], [2, 2], [9, 1]])
    assert torch.equal(found.gather(ids), found.everywhere().gather(-1, ids))
    likeliest, logprobs = found.topk(5)
    assert torch.equal(logprobs, found.everywhere().sort(descending=True).values[:, :5])
    assert torch.equal(found.gather(likeliest), logprobs)
    some = found.select(torch.tensor([2, 0]))
    assert torch.equal(some.everywhere(), found.everywhere()[[2, 0]])
    assert some.token_ids.tolist() == found.token_ids[[2, 0]].tolist()


def test_a_teacher_that_only_says_what_is_left_out_says_nothing():
    found = over_cells(
        DenseTargets(torch.tensor([[5.0, NEVER, NEVER]])), Cells.of(map_of([-1, 0, 1], [0, 1], 2))
    )
    assert found.everywhere().tolist() == [[NEVER, NEVER]]
    assert found.token_ids.tolist() == [-1]
    assert found.leading(128, 2)[2].tolist() == [0]
    assert dbild_loss(torch.zeros(1, 2), found).item() == 0


def test_leading_cells_are_those_of_the_leading_ids_each_once():
    """Ids 0 and 3 are one cell, whose mass outweighs that of id 1; id 2 is in none."""
    logprobs = torch.tensor([[0.30, 0.31, 0.16, 0.20, 0.02, 0.01]]).log()
    targets = over_cells(DenseTargets(logprobs), Cells.of(map_of([2, 0, -1, 2, 1, 3], [0, 1, 2, 3], 4)))
    cells, found, k = targets.leading(6, 6)
    assert k.tolist() == [4]
    assert cells[0, :4].tolist() == [2, 0, 1, 3]
    expected = torch.tensor([[0.50, 0.31, 0.02, 0.01]]) / 0.84
    torch.testing.assert_close(found[:, :4].exp(), expected)
    assert (found[:, 4:] == NEVER).all()
    assert 0 <= int(cells.min()) <= int(cells.max()) < 4  # padding too
    cells, _, k = targets.leading(4, 4)  # ids 1, 0, 3 and 2
    assert (k.tolist(), cells[0, :2].tolist()) == ([2], [2, 0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), window=st.integers(2, 40), data=st.data())
def test_leading_cells_are_pythons(seed, window, data):
    min_k = data.draw(st.integers(2, window))
    cells, base = random_map(60, 50, 12, seed), DenseTargets(random_logits(4, 60, seed))
    targets = over_cells(base, Cells.of(cells))
    ids, _, base_k = base.leading(window, min_k)
    found, logprobs, k = targets.leading(window, min_k)
    for row in range(4):
        led = {int(cells.teacher[i]) for i in ids[row, : base_k[row]]} - {-1}
        assert len(led) == k[row]
        assert set(found[row, : k[row]].tolist()) == led
    assert torch.equal(logprobs, logprobs.sort(descending=True).values)
    valid = torch.arange(found.shape[1]) < k[:, None]
    assert torch.equal(logprobs[valid], targets.gather(found)[valid])


# ---- losses


@each_loss
@pytest.mark.parametrize("cached", [False, True])
def test_where_cells_are_the_ids_every_loss_is_the_plain_one(name, cached):
    """Value and gradient."""
    hidden, head = model_states(40, 12, 90)
    live = (hidden @ head.T).float()
    targets = roundtrip(hidden, head, token_ids(40), tail="exact", top_k=20, window=16)[0] if cached else None
    targets = targets or DenseTargets(live)
    same = Cells.of(map_of(list(range(90)), list(range(90)), 90))
    results = []
    for of_student, of_teacher in ((lambda x: x, targets), (same.of_student, over_cells(targets, same))):
        student = (live + random_logits(40, 90, 1, 1.0).float()).requires_grad_()
        loss = loss_function(name)(of_student(student), of_teacher, reduction="none")
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), student)))
    rounding = 1e-3 if cached else 1e-5  # a sketch's logits at some ids are not quite those at all
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)


def test_dbild_of_a_permuted_vocabulary_is_the_plain_one():
    """The student's ids are the teacher's in another order. Nothing but the look-up is left, so all is
    equal to the bit."""
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    cells = Cells.of(map_of(order.tolist(), list(range(500)), 500))
    teacher, student = DenseTargets(random_logits(30, 500, 1)), random_logits(30, 500, 2)
    plain, permuted = (student[:, order].requires_grad_() for _ in range(2))
    of_cells = torch.empty_like(student)
    of_cells[:, order] = permuted.detach()
    of_cells.requires_grad_()
    expected = dbild_loss(plain, teacher.select(torch.arange(30)), reduction="none")
    found = dbild_loss(cells.of_student(of_cells), over_cells(teacher, cells), reduction="none")
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(expected.sum(), plain)
    (over,) = torch.autograd.grad(found.sum(), of_cells)
    assert torch.equal(over[:, order], gradient)


@pytest.mark.parametrize("seed", range(8))
def test_dbild_over_cells_is_the_pairwise_form(seed):
    cells = random_map(70, 90, 25, seed)
    teacher, student = random_logits(5, 70, seed), random_logits(5, 90, seed + 1).requires_grad_()
    laid = Cells.of(cells)
    found = dbild_loss(
        laid.of_student(student), over_cells(DenseTargets(teacher), laid), temperature=2.0, reduction="none"
    )
    expected = slow_dbild(student, teacher, cells, 2.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    ours, slow = (torch.autograd.grad(loss.sum(), student)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, slow, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"dbild"}))
@pytest.mark.parametrize("seed", range(3))
def test_every_other_loss_over_cells_is_that_of_cells_summed_in_python(name, seed):
    cells = random_map(70, 90, 25, seed)
    teacher, student = random_logits(5, 70, seed), random_logits(5, 90, seed + 1).requires_grad_()
    how = {} if "k" not in LOSSES[name].model_fields else {"k": 9}
    laid, loss = Cells.of(cells), loss_function(name)
    found = loss(laid.of_student(student), over_cells(DenseTargets(teacher), laid), reduction="none", **how)
    merged = DenseTargets(slow_merge(teacher, cells.teacher, 25))
    expected = loss(slow_student(student, cells.student, 25), merged, reduction="none", **how)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    ours, slow = (torch.autograd.grad(each.sum(), student)[0] for each in (found, expected))
    torch.testing.assert_close(ours, slow, rtol=1e-8, atol=1e-10)


@each_loss
def test_a_live_teacher_in_chunks_is_the_whole(name):
    """Of which only some tokens are compared, in another order."""
    hidden, head = model_states(50, 12, 70)
    weights = random_logits(12, 90, 3, 0.5).float().requires_grad_()
    how = {"k": 9} if "k" in LOSSES[name].model_fields else {}
    laid, states = Cells.of(random_map(70, 90, 25, 0)), random_logits(20, 12, 4).float()
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20]
    live = LiveTargets(token_ids(50)[rows], hidden[rows], lambda some: some @ head.T, 70)
    lazy = OverCells(live, laid)
    assert (len(lazy), lazy.vocab_size) == (20, 25)
    assert lazy.token_ids.tolist() == laid.teacher.cell[token_ids(50)[rows]].tolist()
    results = []
    for chunk in (100, 3):
        total = summed_over_chunks(
            lambda some, rows: {
                "loss": loss_function(name)(
                    laid.of_student(some @ weights), lazy.select(rows), reduction="sum", **how
                )
            },
            states,
            chunk,
        )["loss"]
        results.append((total.detach(), *torch.autograd.grad(total, weights)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["both", "teacher", "student"])
def test_the_gradient_is_on_members_of_the_chosen_cells_alone_and_sums_to_0(direction):
    cells = random_map(400, 600, 150, 0)
    laid, base = Cells.of(cells), DenseTargets(random_logits(6, 400, 0))
    student, targets = random_logits(6, 600, 1).requires_grad_(), over_cells(base, laid)
    merged = laid.of_student(student)
    loss = dbild_loss(merged, targets, direction=direction, window=20)
    (gradient,) = torch.autograd.grad(loss, student)
    led, _, k = targets.leading(20, 2)
    for row in range(6):
        values, order = merged[row].detach().sort(descending=True)
        leading = order[: max(2, int(kneedle_k(values[None, :20])))].tolist()
        chosen = set(led[row, : k[row]].tolist() if direction != "student" else [])
        chosen |= set(leading if direction != "teacher" else [])
        inside = torch.tensor([cell in chosen for cell in cells.student.tolist()])
        assert gradient[row, ~inside].abs().max() == 0
        assert gradient[row, inside].abs().min() > 0
    assert gradient.sum(-1).abs().max() < 1e-12


def test_cached_is_live_through_cells():
    hidden, head = model_states(120, 24, 300)
    laid = Cells.of(random_map(300, 400, 90, 0))
    student = random_logits(120, 400, 1, 3.0).float().requires_grad_()
    cosines = {}
    for tail in ("exact", "bytes=6", "none"):
        how = {"tail": tail, "top_k": 40, "window": 40}
        targets, _ = roundtrip(hidden, head, token_ids(120), **how)
        results = []
        for either in (targets, DenseTargets(hidden @ head.T, token_ids(120))):
            loss = dbild_loss(laid.of_student(student), over_cells(either, laid), window=40, reduction="none")
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), student)))
        (cached, towards), (live, gradient) = results
        cosines[tail] = torch.cosine_similarity(towards, gradient, dim=-1).mean().item()
        if tail == "exact":
            assert abs(cached.mean() / live.mean() - 1) < 1e-3
            assert (towards - gradient).norm() < 0.01 * gradient.norm()
    assert cosines["exact"] > 0.9999 > cosines["bytes=6"] > cosines["none"]


@each_loss
def test_cells_that_one_side_has_no_ids_in_are_none(name):
    """As where one side still has a blank to emit: few of its tokens begin with one. Of an impossible cell a
    loss would say that the other side must never be in it."""
    whole = random_map(70, 90, 25, 0)
    teacher, student = random_logits(5, 70, 0), random_logits(5, 90, 1)
    lacking = {"teacher": (3, 4, 24), "student": (0, 4, 11)}
    sides = {side: getattr(whole, side) for side in lacking}
    sides |= {side: np.where(np.isin(sides[side], lacking[side]), -1, sides[side]) for side in lacking}
    number = np.cumsum(~np.isin(np.arange(25), (0, 3, 4, 11, 24))) - 1
    without = map_of(
        *(
            [-1 if cell in (-1, 0, 3, 4, 11, 24) else int(number[cell]) for cell in getattr(whole, side)]
            for side in lacking
        ),
        20,
    )
    how = {"k": 9} if "k" in LOSSES[name].model_fields else {}
    results = []
    for cells in (replace(whole, **sides), without):
        laid, own = Cells.of(cells), student.clone().requires_grad_()
        loss = loss_function(name)(
            laid.of_student(own), over_cells(DenseTargets(teacher), laid), reduction="none", **how
        )
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), own)))
    assert results[0][0].max() < 100
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---- a vocabulary that is another one cut short

TEXTS = [*"abcd", "ab", "cd", "aa", "abcd", "bc", "aab", "cdcd", "abab", "dd", "aabcd", "cdd", "bcc", "abcdd"]
MERGES = [
    b"ab",
    b"cd",
    b"aa",
    b"abcd",
    b"bc",
    b"aab",
    b"cdcd",
    b"abab",
    b"dd",
    b"aabcd",
    b"cdd",
    b"bcc",
    b"abcdd",
]


def test_a_teacher_told_in_a_vocabulary_cut_short_has_no_loss_over_cells():
    """Both merge in one order, the student fewer: it reads each of the teacher's tokens as some of its own.
    What the teacher says of its next token, told in its tokens, is the sum over the teacher's tokens that
    begin with it."""
    teacher = TokenBytes(tuple(text.encode() for text in TEXTS), frozenset(), None)
    student = TokenBytes(teacher.contents[:7], frozenset(), None)
    logits = random_logits(50, len(TEXTS), 0, 2.0)
    probabilities = torch.zeros(50, 7, dtype=torch.float64)
    for number, text in enumerate(teacher.contents):
        probabilities[:, student.contents.index(encode(text, MERGES[:3])[0])] += logits.softmax(-1)[:, number]
    losses = {}
    for exact in (False, True):
        laid = Cells.of(CellMap.build(teacher, student, exact=exact))
        own = probabilities.log().requires_grad_()
        loss = dbild_loss(laid.of_student(own), over_cells(DenseTargets(logits), laid), temperature=1.0)
        losses[exact] = loss.item(), torch.autograd.grad(loss, own)[0].abs().max().item()
    assert losses[False] == pytest.approx((0, 0), abs=1e-12)
    assert min(losses[True]) > 0.01
    assert losses[True][0] > 0.1


def encode(text: bytes, merges: list[bytes]) -> list[bytes]:
    """Byte-pair encoding, a merge after the other."""
    parts = [bytes([byte]) for byte in text]
    for merged in merges:
        at = 0
        while at + 1 < len(parts):
            if parts[at] + parts[at + 1] == merged:
                parts[at : at + 2] = [merged]
            at += 1
    return parts


@pytest.mark.slow
def test_smollm2_told_in_its_own_vocabulary_cut_short_has_no_loss_over_cells():
    """The same with real merges: the student has the first 8,192 of 49,152 tokens. How these merges cut a
    token, the library says."""
    whole, size = smollm2(), 8192
    state = json.loads(whole.to_str())
    pieces = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"] = {piece: number for number, piece in enumerate(pieces[:size])}
    merges = state["model"]["merges"]
    state["model"]["merges"] = [pair for pair in merges if "".join(pair) in state["model"]["vocab"]]
    cut = Tokenizer.from_str(json.dumps(state))
    teacher, student = (TokenBytes.of(fast(each), whole.token_to_id("<|im_end|>")) for each in (whole, cut))
    assert (len(teacher), len(student)) == (49_152, size)
    first = [
        number if number in teacher.special else cut.model.tokenize(piece)[0].id
        for number, piece in enumerate(pieces)
    ]
    logits = random_logits(8, len(pieces), 0, 3.0)
    probabilities = torch.zeros(8, size, dtype=torch.float64)
    probabilities.index_add_(1, torch.tensor(first), logits.softmax(-1))
    losses = {}
    for exact in (False, True):
        laid = Cells.of(CellMap.build(teacher, student, exact=exact))
        own = probabilities.log().requires_grad_()
        loss = dbild_loss(laid.of_student(own), over_cells(DenseTargets(logits), laid))
        losses[exact] = loss.item(), torch.autograd.grad(loss, own)[0].abs().max().item()
    assert losses[False] == pytest.approx((0, 0), abs=1e-12)
    assert losses[True][0] > 0.1


# ---- refused


def test_models_with_other_vocabularies_are_refused():
    laid = Cells.of(random_map(60, 300, 40, 0))
    for shape in ((2, laid.student.least - 1), (300,)):
        with pytest.raises(CachekdError, match="logits do not match its vocabulary"):
            laid.of_student(torch.zeros(shape))
    for size in (laid.teacher.least - 1, 61):
        with pytest.raises(CachekdError, match="targets do not match its vocabulary"):
            laid.of_teacher(DenseTargets(torch.zeros(2, size)))
