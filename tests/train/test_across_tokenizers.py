"""Teacher and student with different tokenizers, templates and special tokens: terms, counts and batches."""

from __future__ import annotations

import pytest
import torch

from cachekd.config import TrainConfig
from cachekd.losses import cross_entropy_loss
from cachekd.models import load_model, logits_at
from cachekd.train.across import cut_to
from cachekd.train.batch import collate_with_targets
from cachekd.train.open import make_trainer
from cachekd.vocabulary import TokenBytes
from tokenizer_pairs import STUDENTS, run_settings, save_pair, write_data

CPU = torch.device("cpu")
TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_pair(tmp_path_factory.mktemp("across"))
    write_data(folder / "data", 12)
    return folder


@pytest.fixture
def settings(folder, tmp_path) -> dict:
    return run_settings(folder, tmp_path / "run", epochs=1, save_steps=0)


def terms_of(trainer, indices):
    """The batch of some samples, and its terms."""
    batch = collate_with_targets([trainer.train_dataset[index] for index in indices], 0)
    return batch, trainer.terms_of(trainer.model, batch)


# ---- L_VSD


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("live", [False, True])
def test_vsd_is_that_of_a_student_with_the_teachers_tokenizer(settings, folder, tmp_path, student, live):
    """The same V_S, the same teacher, the teacher's own text: the same number, and the same gradient. There
    is nothing to set for it."""
    found = []
    for name in ("same", student):
        changed = {"student": str(folder / name), "lambda_align": 0.0, "align_vocabulary": "none"}
        changed |= {"live_teacher": True, "cache": None} if live else {}
        trainer = make_trainer(TrainConfig(**settings | changed), tmp_path / name)
        batch, terms = terms_of(trainer, range(5))
        assert (batch.aligned is None) == (name == "same")
        if batch.aligned is not None:  # pictures that nobody looks at are not carried to the device
            assert ("pixel_values" in batch.teacher.tensors) == live
        terms.terms["vsd"].backward()
        tower = trainer.vlm.model.vision_tower.named_parameters()
        gradient = {name: p.grad for name, p in tower if p.grad is not None}
        found.append((terms, gradient))
        others = [p for n, p in trainer.vlm.named_parameters() if "vision_tower" not in n]
        assert not any(p.grad is not None and p.grad.any() for p in others)
    (same, expected), (across, gradient) = found
    torch.testing.assert_close(across.terms["vsd"], same.terms["vsd"], rtol=1e-5, atol=0)
    assert across.counts["vsd"] == across.divisors["vsd"] == same.counts["vsd"] == same.tokens
    assert across.tokens != same.tokens
    assert gradient.keys() == expected.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7, msg=name)


# ---- L_Align, against a slow reference


def words(tokens: TokenBytes) -> dict[bytes, list[int]]:
    """The ids of each string."""
    found: dict[bytes, list[int]] = {}
    for number, content in enumerate(tokens.contents):
        if content and number not in tokens.special:
            found.setdefault(content, []).append(number)
    return found


def slow_cells(teacher: TokenBytes, student: TokenBytes, lead: str | None = None):
    """Of each string that both can say, the ids on both sides; the last is the end of a turn.

    Args:
        lead: the side of which a token counts by what follows the blank that it begins with.
    """
    sides = [words(teacher), words(student)]
    shared = sorted(sides[0].keys() & sides[1].keys())
    if lead is not None:
        side = ("teacher", "student").index(lead)
        blank = {content[1:]: ids for content, ids in sides[side].items() if content[:1] == b" "}
        sides[side] = blank
        shared = [content for content in shared if content in blank]
    cells = [(sides[0][content], sides[1][content]) for content in shared]
    if lead is not None:  # behind a blank there is no name
        return cells
    names = [{t.contents[n]: [n] for n in t.special if n != t.end_of_turn} for t in (teacher, student)]
    cells += [(names[0][name], names[1][name]) for name in sorted(names[0].keys() & names[1].keys())]
    return [*cells, ([teacher.end_of_turn], [student.end_of_turn])]


def slow_rows(teacher: TokenBytes, student: TokenBytes, theirs: list[int], ours: list[int]):
    """(lead, i, j) of a sample's answers: before token i and j both have read the same bytes of a turn, and
    these two are the same string, or both the end of the turn."""

    def starts(tokens: TokenBytes, ids: list[int]) -> list[tuple[int, int, bytes, bool]]:
        """Turn, bytes read before, content, and whether it is the end of the turn."""
        found, turn, read = [], 0, 0
        for number in ids:
            is_end = number == tokens.end_of_turn
            found.append((turn, read, tokens.contents[number], is_end))
            turn, read = (turn + 1, 0) if is_end else (turn, read + len(tokens.contents[number]))
        return found

    one, other = starts(teacher, theirs), starts(student, ours)
    # The bytes of each turn; where one side's begin with a blank that the template of the other wrote.
    text = [{}, {}]
    for side, places in enumerate((one, other)):
        for turn, _, content, is_end in places:
            text[side][turn] = text[side].get(turn, b"") + (b"" if is_end else content)
    found = []
    for i, (turn, read, content, is_end) in enumerate(one):
        for j, (turn_too, read_too, content_too, is_end_too) in enumerate(other):
            if turn != turn_too:
                continue
            blanks = [t[turn][:1] == b" " for t in text]
            shift = [int(blank and not all(blanks)) for blank in blanks]
            begins = read == read_too == 0
            if not begins and read - shift[0] != read_too - shift[1]:
                continue
            lead, contents = None, [content, content_too]
            if begins and any(shift):
                side = shift.index(1)
                lead, contents[side] = ("teacher", "student")[side], contents[side][1:]
            same = (is_end and is_end_too) or (contents[0] == contents[1] and not is_end and not is_end_too)
            if same:
                found.append((lead, i, j))
    return found


def slow_align(teacher: TokenBytes, student: TokenBytes, logprobs, logits, theirs, ours):
    """Forward KL over the shared strings at the aligned rows, and how many these are.

    Args:
        logprobs, logits: [N_T, V_T] and [N_S, V_S], of one sample.
    """
    rows = slow_rows(teacher, student, theirs, ours)
    total = torch.zeros((), dtype=torch.float64)
    for lead, i, j in rows:
        p, q = [], []
        for of_teacher, of_student in slow_cells(teacher, student, lead):
            p.append(logprobs[i, of_teacher].double().logsumexp(0))
            q.append(logits[j, of_student].double().logsumexp(0))
        p, q = ((torch.stack(x) / TEMPERATURE).log_softmax(0) for x in (p, q))
        total += (p.exp() * (p - q)).sum()
    return total, len(rows)


@pytest.mark.parametrize("student", STUDENTS)
def test_align_over_shared_strings_is_the_slow_sum(settings, folder, tmp_path, student):
    """Term, gradient, rows and divisors of a batch: of whole models, one row and one string at a time."""
    said = {"student": str(folder / student), "align_vocabulary": "exact", "align": "forward_kl"}
    config = TrainConfig(**settings | said, temperature=TEMPERATURE, logit_chunk=5)
    trainer = make_trainer(config, tmp_path / "t")
    batch, found = terms_of(trainer, range(6))
    pair = trainer.terms.across.pair
    whole = load_model(config.student, dtype=torch.float32, device=CPU)
    logits = logits_at(whole, batch.student.tensors, batch.student.positions)
    torch.testing.assert_close(
        found.terms["ce"], cross_entropy_loss(logits, batch.student.token_ids, reduction="sum")
    )
    expected, rows, at = 0.0, 0, 0
    for index in range(6):
        example = trainer.train_dataset[index]
        ids = [side.token_ids.tolist() for side in (example.targets, example.encoded)]
        own = logits[at : at + len(ids[1])]
        value, some = slow_align(pair.teacher, pair.student, example.targets.everywhere(), own, *ids)
        expected, rows, at = expected + value, rows + some, at + len(ids[1])
    assert 20 < rows < len(logits)
    torch.testing.assert_close(found.terms["align"].double(), expected, rtol=1e-4, atol=1e-5)
    taught = sum(len(trainer.train_dataset[index].targets) for index in range(6))
    assert found.divisors == {"ce": len(logits), "align": rows, "vsd": taught}
    whole.zero_grad()
    expected.backward()
    found.terms["align"].backward(retain_graph=True)
    for ours, theirs in zip(trainer.vlm.parameters(), whole.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    loss = trainer.compute_loss(trainer.model, batch)
    divided = sum(term / found.divisors[name] for name, term in found.terms.items())
    torch.testing.assert_close(loss, divided)


def test_ids_that_a_model_has_no_logits_for_are_in_no_vocabulary():
    """A tokenizer may have more tokens than the model rows; the end of a turn may be among them."""
    tokens = TokenBytes((b"<end>", b"a", b"b", b"<x>", b"c"), frozenset({0, 3}), 3)
    assert cut_to(tokens, 5) is tokens
    assert cut_to(tokens, 9) is tokens
    assert cut_to(tokens, 4) == TokenBytes((b"<end>", b"a", b"b", b"<x>"), frozenset({0, 3}), 3)
    assert cut_to(tokens, 3) == TokenBytes((b"<end>", b"a", b"b"), frozenset({0}), None)
