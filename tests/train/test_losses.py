"""Every loss of the table in training: a new row is tested by this file as it is."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cachekd.config import TrainConfig
from cachekd.config.losses import LOSSES
from cachekd.losses import loss_function
from cachekd.losses.targets import DenseTargets
from cachekd.train.batch import collate_with_targets
from cachekd.train.open import losses_of, make_trainer
from caches import cached

each_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(scope="module")
def settings(pair) -> dict:
    shared, folder = pair
    return shared | {"epochs": 1, "cache": str(cached(shared, folder, tail="exact"))}


def trainer_of(settings: dict, folder, **changes):
    return make_trainer(TrainConfig(**settings | {"out": folder / "x"} | changes), folder / "t")


def batch_in(trainer):
    return collate_with_targets([trainer.train_dataset[index] for index in range(4)], 0)


@each_loss
def test_a_run_takes_it_by_its_name_and_its_terms_are_its_sums(settings, tmp_path, name):
    trainer = trainer_of(settings, tmp_path, align=name, vsd={"loss": name})
    batch = batch_in(trainer)
    found = trainer.terms_of(trainer.model, batch).terms
    targets = batch.targets
    logits = trainer.model(**batch.student.tensors).logits[batch.student.positions][:, : targets.vocab_size]
    taken = inspect.signature(loss_function(name)).parameters
    temperature = {"temperature": 3.0} if "temperature" in taken else {}  # the run's
    expected = loss_function(name)(logits, targets, reduction="sum", **temperature)
    torch.testing.assert_close(found["align"], expected)
    assert found["vsd"] != found["align"]
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4
    for step in steps:
        assert step["loss"] == pytest.approx(step["ce"] + step["align"] + step["vsd"], rel=1e-4)
        assert min(step["align"], step["vsd"]) > 0


def terms_and_gradient(trainer) -> tuple[list[float], Tensor]:
    """L_Align and L_VSD of a batch, and the gradient of their sum in the whole student."""
    terms = trainer.terms_of(trainer.model, batch_in(trainer)).terms
    (terms["align"] + terms["vsd"]).backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return [terms["align"].item(), terms["vsd"].item()], torch.cat(gradients)


def assert_alike(one: tuple[list[float], Tensor], other: tuple[list[float], Tensor], nearness: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=nearness)
    assert (one[1] - other[1]).norm() <= nearness * other[1].norm()


@each_loss
def test_cached_is_live(settings, tmp_path, name):
    """In the first step, value and gradient."""
    cached = trainer_of(settings, tmp_path / "cached", align=name, vsd=name)
    live = {"cache": None, "live_teacher": True}
    live = trainer_of(settings, tmp_path / "live", align=name, vsd=name, **live)
    assert_alike(terms_and_gradient(cached), terms_and_gradient(live), 0.01)


@each_loss
def test_chunks_are_the_whole(settings, tmp_path, name):
    whole, chunked = (
        trainer_of(settings, tmp_path / str(chunk), align=name, vsd=name, logit_chunk=chunk)
        for chunk in (10**6, 3)
    )
    assert_alike(terms_and_gradient(chunked), terms_and_gradient(whole), 1e-3)


class Wide(TorchDispatchMode):
    """How many rows tensors as wide as a vocabulary have, but for the weights of heads."""

    def __init__(self, widths: set[int]) -> None:
        super().__init__()
        self.widths, self.rows = widths, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tensors = [each for each in tree_leaves(out) if isinstance(each, Tensor) and each.ndim > 1]
        wide = [each for each in tensors if each.is_floating_point() and each.shape[-1] in self.widths]
        self.rows |= {each.numel() // each.shape[-1] for each in wide} - HEADS
        return out


HEADS = {32, 48, 49}  # the weights of two language models' heads, and the axes of the tail sketch


@each_loss
@pytest.mark.parametrize("live", [False, True])
def test_no_distribution_of_a_whole_batch_exists(settings, tmp_path, name, live):
    """Forward and backward, of the student's logits and of the teacher's."""
    teacher = {"cache": None, "live_teacher": True} if live else {}
    trainer = trainer_of(settings, tmp_path, align=name, vsd=name, logit_chunk=5, **teacher)
    batch = batch_in(trainer)
    tokens, vocabulary = len(batch.student.token_ids), len(trainer.encoder.processor.tokenizer)
    with Wide({vocabulary, vocabulary + 1, 320, 448}) as wide:
        trainer.training_step(trainer.model, batch, tokens)
    assert max(wide.rows) == 5 < tokens
    assert tokens not in HEADS


def test_settings_reach_the_loss_of_their_term_alone(settings, tmp_path):
    """Each term its own loss; a setting that the loss does not say is the run's."""
    config = TrainConfig(
        **settings,
        out=tmp_path / "x",
        align={"loss": "dbild", "direction": "teacher", "temperature": 2},
        vsd="{loss: jsd, beta: 0.2}",
        temperature=1.5,
    )
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 50, generator=generator) for _ in range(2))
    targets, losses = DenseTargets(teacher), losses_of(config)
    of_align = loss_function("dbild")(student, targets, direction="teacher", temperature=2, reduction="sum")
    of_vsd = loss_function("jsd")(student, targets, beta=0.2, temperature=1.5, reduction="sum")
    assert torch.equal(losses["align"](student, targets), of_align)
    assert torch.equal(losses["vsd"](student, targets), of_vsd)


def test_the_default_is_what_it_was(settings, tmp_path):
    """DBiLD at the run's temperature for both, bit for bit."""
    runs = []
    for number, said in enumerate(({}, {"align": "dbild", "vsd": {"loss": "dbild", "direction": "both"}})):
        trainer = trainer_of(settings, tmp_path / str(number), **said)
        batch = batch_in(trainer)
        terms = trainer.terms_of(trainer.model, batch).terms
        runs.append([terms[name].item() for name in ("ce", "align", "vsd")])
    assert runs[0] == runs[1]
    targets, positions = batch.targets, batch.student.positions
    states = trainer.terms.head.states(
        lambda: trainer.model(**batch.student.tensors, logits_to_keep=positions).logits.flatten(0, -2)
    )
    logits = trainer.terms.head.logits(states)[:, : targets.vocab_size]
    how = {"window": targets.window, "min_k": targets.min_k, "temperature": 3.0, "direction": "both"}
    assert loss_function("dbild")(logits, targets, reduction="sum", **how).item() == runs[0][1]


def test_a_cache_without_a_sketch_is_told_of_where_a_loss_asks_for_all(pair, tmp_path, caplog):
    shared, folder = pair
    plain = shared | {"epochs": 1, "cache": str(cached(shared, folder, tail="none"))}
    trainer_of(plain, tmp_path, align="topk_kl", vsd="dbild")
    assert "spread evenly" not in caplog.text
    trainer = trainer_of(plain, tmp_path, align="topk_kl", vsd="mse")
    assert "L_VSD: the loss asks for the teacher's whole distribution" in caplog.text
    terms = trainer.terms_of(trainer.model, batch_in(trainer)).terms
    assert all(term.isfinite() for term in terms.values())


def test_the_likeliest_ids_are_the_kept_ones_where_there_are_enough(settings, tmp_path):
    """Else those of the rebuilt distribution."""
    targets = batch_in(trainer_of(settings, tmp_path)).targets
    fewest, most = int(targets.k.min()), int(targets.k.max())
    assert fewest < most
    ids, logprobs = targets.topk(fewest)
    assert torch.equal(ids, targets.ids[:, :fewest])
    assert torch.equal(logprobs, targets.logprobs[:, :fewest])
    ids, logprobs = targets.topk(most)
    torch.testing.assert_close(logprobs, targets.everywhere().topk(most, dim=-1).values, atol=0.02, rtol=0)
    torch.testing.assert_close(targets.gather(ids), logprobs, atol=0.02, rtol=0)
    whole = targets.k == most
    assert torch.equal(ids[whole], targets.ids[whole])
