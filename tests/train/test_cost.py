"""What a run says that it cost."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack

from cachekd.config import TrainConfig
from cachekd.models.device import peak_memory, reset_peak
from cachekd.paths import RUN_FILE
from cachekd.report.runs import read_run
from cachekd.train import train
from cachekd.train.cost import COST_FILE, Cost, CostMeter
from cachekd.train.open import make_trainer
from runs import CutShort


def cost_of(out) -> Cost:
    return Cost.model_validate(json.loads((out / RUN_FILE).read_text())["cost"])


def products(run) -> float:
    """The operations of all products in `run`, from the shapes alone: torch's formulas are not asked."""
    total = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal total
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.removeprefix("aten::")
            if name in ("mm", "bmm"):
                total += 2 * out.numel() * args[0].shape[-1]
            elif name == "addmm":
                total += 2 * out.numel() * args[1].shape[-1]
            elif name == "convolution":
                total += 2 * out.numel() * args[1][0].numel()
            elif name == "convolution_backward":  # of the input, of the weights, as the mask says
                total += 2 * args[0].numel() * args[2][0].numel() * sum(args[-1][:2])
            elif name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
                backward = name.endswith("backward")
                q, k = args[backward : 2 + backward]
                # Two products forward; backward five, one of which computes the scores again.
                total += (5 if backward else 2) * 2 * q.numel() * k.shape[-2]
            return out

    with Count():
        run()
    return total


def test_a_layers_operations_are_those_of_the_textbook():
    """2 m n k for each of three products; of two batches that are counted, and one that is not."""
    layer, meter = nn.Linear(6, 5, bias=False), CostMeter()
    for step in range(3):
        x = torch.randn(4, 6, requires_grad=True)
        with meter.batch(4, step, "all"):
            layer(x).sum().backward()
    assert meter.cost(3).flops == 3 * 3 * 2 * 4 * 6 * 5
    assert meter.cost(3).tokens == 12


def test_attention_on_a_cpu_is_counted():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (7, 11, 11))
    meter = CostMeter()
    with meter.batch(1, 0, "all"):
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    one_product = 2 * (2 * 3) * 7 * 11 * 8
    assert meter.cost(1).flops == 7 * one_product


def test_attention_whose_keys_have_fewer_heads_is_counted():
    """torch's own formula fails there."""
    q, k, v = (torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (4, 2, 2))
    meter = CostMeter()
    with meter.batch(1, 0, "all"):
        nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum().backward()
    cost = meter.cost(1)
    assert (cost.flops, cost.uncounted) == (7 * 2 * (2 * 4) * 7 * 7 * 8, None)


def test_a_formula_that_fails_stops_no_run(monkeypatch):
    def fails(*args, **kwargs):
        raise AssertionError("sdpa_flop_count: query/key/value shapes are incompatible")

    monkeypatch.setattr("cachekd.train.flops._forward", fails)
    q = torch.randn(1, 1, 3, 8, requires_grad=True)
    meter = CostMeter()
    with meter.batch(1, 0, "all"):
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    cost = meter.cost(1)
    assert cost.flops is None
    assert "_scaled_dot_product_flash_attention_for_cpu" in cost.uncounted


@pytest.mark.parametrize("method", [{}, {"lambda_vsd": 0.0}, {"lambda_vsd": 0.0, "lambda_align": 0.0}])
def test_a_steps_operations_equal_those_of_a_count_by_hand(settings, tmp_path, method):
    trainer = make_trainer(TrainConfig(**settings | method), tmp_path)
    batch = trainer.feed.collate([trainer.train_dataset[index] for index in range(4)])
    tokens = int(batch.student.supervised.sum())
    trainer.create_optimizer()

    def step():
        trainer.training_step(trainer.model, batch, tokens)

    expected = products(step)
    trainer.cost = CostMeter()
    step()
    assert trainer.cost.cost(1).flops == expected


def test_what_checkpointing_computes_again_is_counted(settings, tmp_path):
    found = {}
    for again in (False, True):
        trainer = make_trainer(TrainConfig(**settings, gradient_checkpointing=again), tmp_path)
        batch = trainer.feed.collate([trainer.train_dataset[index] for index in range(4)])
        trainer.training_step(trainer.model, batch, int(batch.student.supervised.sum()))
        found[again] = trainer.cost.cost(1).flops
    assert 1.1 * found[False] < found[True] < 1.5 * found[False]  # a forward more; backward is two


def test_a_run_says_what_it_cost_and_costs_more_with_the_switch(settings, tmp_path):
    settings |= {"epochs": 3}
    found = {}
    for name, changed in {
        "all": {},
        "every third": {"vsd_every": 3},
        "ce": {"lambda_align": 0.0, "lambda_vsd": 0.0},
    }.items():
        train(TrainConfig(**settings | changed | {"out": tmp_path / name}))
        found[name] = cost_of(tmp_path / name)
    costs = found.values()
    assert {cost.steps for cost in costs} == {9}
    assert len({cost.tokens for cost in costs}) == 1
    assert all(cost.seconds > 0 and cost.sessions == "all" and cost.uncounted is None for cost in costs)
    switched, third, ce = (cost.flops for cost in costs)
    # Three of nine steps run through the teacher. Batches differ a little in their padding.
    assert third == pytest.approx(ce + (switched - ce) / 3, rel=0.05)
    assert switched > 1.3 * ce


def test_what_is_measured_once_is_not_scaled_up(settings, tmp_path):
    """The one batch whose terms' gradients are logged takes more backwards; the others do not."""
    settings |= {"epochs": 3, "logging_steps": 100}
    found = {}
    for measures in (False, True):
        out = tmp_path / f"run-{measures}"
        train(TrainConfig(**settings | {"log_term_gradients": measures, "out": out}))
        found[measures] = cost_of(out).flops
    assert found[False] * 1.01 < found[True] < found[False] * (1 + 3 / 9)


def test_counting_changes_nothing(settings, tmp_path, monkeypatch):
    train(TrainConfig(**settings))
    monkeypatch.setattr("cachekd.train.cost.COUNTED", 0)
    train(TrainConfig(**settings | {"out": tmp_path / "other"}))
    uncounted = cost_of(tmp_path / "other")
    assert (uncounted.flops, uncounted.uncounted) == (None, "no step was done that could be counted")
    ours, theirs = (load_file(out / "model.safetensors") for out in (settings["out"], tmp_path / "other"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_failed_batch_leaves_no_counter_behind():
    meter = CostMeter()
    with pytest.raises(ZeroDivisionError), meter.batch(4, 0, "all"):
        raise ZeroDivisionError
    assert not _len_torch_dispatch_stack()
    assert meter.cost(1).tokens == 0


# ---- stopped, and gone on with


def test_sessions_add_up(settings, tmp_path):
    settings |= {"save_steps": 2}
    train(TrainConfig(**settings | {"out": tmp_path / "whole"}))
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings), callbacks=[CutShort(5)])
    noted = settings["out"] / "checkpoints/checkpoint-4" / COST_FILE
    before = json.loads(noted.read_text())
    before["seconds"] += 1000
    noted.write_text(json.dumps(before))
    train(TrainConfig(**settings))
    whole, resumed = cost_of(tmp_path / "whole"), cost_of(settings["out"])
    assert 1000 < resumed.seconds < 1000 + 60
    assert (resumed.steps, resumed.tokens, resumed.flops) == (whole.steps, whole.tokens, whole.flops)
    assert resumed.sessions == "all"


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(settings, tmp_path):
    settings |= {"save_steps": 2}
    train(TrainConfig(**settings | {"out": tmp_path / "whole"}))
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings), callbacks=[CutShort(5)])
    (settings["out"] / "checkpoints/checkpoint-4" / COST_FILE).unlink()
    train(TrainConfig(**settings))
    whole, resumed = cost_of(tmp_path / "whole"), cost_of(settings["out"])
    assert (resumed.steps, resumed.sessions) == (6, "last")
    assert resumed.flops == pytest.approx(whole.flops, rel=0.3)  # the last two steps stand for all six


def test_a_run_without_a_cost_is_read(settings):
    train(TrainConfig(**settings))
    path = settings["out"] / RUN_FILE
    saved = json.loads(path.read_text())
    del saved["cost"]
    path.write_text(json.dumps(saved))
    assert "cost" not in read_run(settings["out"]).saved


# ---- where it cannot be known


def test_what_cannot_be_counted_is_none_and_says_why():
    meter = CostMeter(uncounted="weights are sharded")
    with meter.batch(4, 0, "all"):
        assert not _len_torch_dispatch_stack()
        nn.Linear(2, 2)(torch.zeros(1, 2))
    cost = meter.cost(1)
    assert (cost.flops, cost.uncounted, cost.tokens) == (None, "weights are sharded", 4)


def test_two_runs_of_one_process_have_their_own_peaks():
    if not reset_peak():
        pytest.skip("this system's peak cannot be reset")
    meters = []
    for megabytes in (256, 1):
        meter = CostMeter()
        meter.begin()
        before = meter.cost(0).peak_bytes
        taken = torch.ones(megabytes * 2**18)
        meters.append(meter.cost(0).peak_bytes - before)
        del taken
    assert meters[0] > 250 * 2**20
    assert meters[1] < 50 * 2**20
    assert peak_memory() > 0


def test_a_system_whose_peak_cannot_be_reset_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr("cachekd.models.device._RESET_PEAK", tmp_path / "none" / "clear_refs")
    meter = CostMeter()
    meter.begin()
    assert meter.cost(0).peak_bytes is None
