"""Training in batches by their padded tokens: what is in them, and that a run goes on with the same ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from safetensors.torch import load_file

from cachekd.config import DumpConfig, TrainConfig
from cachekd.config.base import defaults_of
from cachekd.data.batches import BatchLimits
from cachekd.dump import dump
from cachekd.errors import CachekdError
from cachekd.train import train
from cachekd.train.estimate import estimate_training
from cachekd.train.open import make_trainer
from cachekd.train.order import TokenBatches
from runs import CutShort, losses
from tiny import plain_error

LENGTHS = torch.randint(26, 147, (300,), generator=torch.Generator().manual_seed(0)).tolist()


def sampler(
    lengths: list[int] = LENGTHS, *, tokens: int = 1000, processes: int = 1, seed: int = 3, epoch: int = 0
):
    return TokenBatches(
        lengths, BatchLimits(tokens=tokens), processes=processes, seed=seed, epoch=lambda: epoch
    )


def cells(batches: list[list[int]], lengths: list[int] = LENGTHS) -> list[int]:
    return [len(some) * max(lengths[i] for i in some) for some in batches]


@pytest.fixture(scope="module")
def unequal_cache(tmp_path_factory, teacher_path, unequal_data) -> Path:
    out = tmp_path_factory.mktemp("unequal-cache") / "c"
    dump(DumpConfig(teacher=str(teacher_path), data=str(unequal_data), out=out))
    return out


@pytest.fixture
def by_tokens(settings, unequal_data, unequal_cache) -> dict:
    settings |= {"data": str(unequal_data), "cache": str(unequal_cache), "batch_tokens": 1500}
    del settings["batch_size"]
    return settings


# ---- the order


def test_every_sample_comes_once_and_batches_are_full():
    batches = list(sampler())
    assert sorted(itertools.chain(*batches)) == list(range(300))
    assert max(cells(batches)) <= 1000
    assert sorted(cells(batches))[1] > 1000 - 147  # all but the last one cut
    padded = 1 - sum(LENGTHS) / sum(cells(batches))
    assert padded < 0.03


def test_an_epoch_has_other_batches_as_many_and_of_the_same_sizes():
    first, second = list(sampler()), list(sampler(epoch=1))
    assert first != second
    assert {frozenset(some) for some in first} != {frozenset(some) for some in second}
    assert sorted(cells(first)) == sorted(cells(second))
    assert len(first) == len(second) == len(sampler())
    torch.rand(5)  # the global random state is nothing to it
    assert list(sampler()) == first != list(sampler(seed=4))


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_have_as_many_batches_and_go_on_where_they_were(processes):
    everything = []
    for rank in range(processes):
        torch.manual_seed(rank)
        of_all = sampler(processes=processes, epoch=1)
        shard = BatchSamplerShard(of_all, processes, rank, even_batches=False)
        everything.append(list(shard))
        assert len(everything[-1]) == len(shard) == len(of_all) / processes
        assert list(SkipBatchSampler(shard, 2)) == everything[-1][2:]
    batches = [some for one in everything for some in one]
    assert sorted(itertools.chain(*batches)) == list(range(300))
    assert max(cells(batches)) <= 1000


def test_fewer_samples_than_processes_come_twice():
    batches = list(sampler([30, 40, 50], processes=4))
    assert len(batches) == 4
    assert sorted({i for some in batches for i in some}) == [0, 1, 2]


def test_a_sample_beyond_the_budget_runs_alone_and_that_is_said(caplog):
    batches = list(sampler([10, 50, 300, 20], tokens=90))
    assert sorted(map(sorted, batches)) == [[0, 3], [1], [2]]
    assert "than a batch is to have, 90, runs alone" in caplog.text


# ---- a run


def test_batches_of_a_run_have_no_more_than_their_tokens(by_tokens, tmp_path):
    trainer = make_trainer(TrainConfig(**by_tokens), tmp_path / "t")
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == len(trainer.get_train_dataloader())
    assert max(batch["input_ids"].numel() for batch in batches) <= 1500 + 32  # their lengths are rough
    assert sorted(key for batch in batches for key in batch.keys) == trainer.train_dataset.samples.keys
    both = make_trainer(TrainConfig(**by_tokens, batch_size=5), tmp_path / "b")
    assert max(len(batch.keys) for batch in both.get_train_dataloader()) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_in_the_middle_of_an_epoch_the_run_is_the_same_bit_for_bit(by_tokens, tmp_path, workers):
    by_tokens |= {"save_steps": 2, "epochs": 2 + workers, "gradient_accumulation": 2, "workers": workers}
    whole = TrainConfig(**by_tokens | {"out": tmp_path / "whole"})
    steps = train(whole).steps
    config = TrainConfig(**by_tokens)
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(7)])
    assert train(config).resumed_from == 6
    assert steps == 4 * (2 + workers)  # so it was in the middle of the second epoch
    assert losses(config.out) == losses(whole.out)
    ours, theirs = (load_file(path / "model.safetensors") for path in (config.out, whole.out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_goes_on_with_its_tokens_only(by_tokens):
    by_tokens |= {"save_steps": 1, "epochs": 1}
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**by_tokens), [CutShort(2)])
    with pytest.raises(CachekdError, match="begun with other settings") as caught:
        train(TrainConfig(**by_tokens | {"batch_tokens": 750, "gradient_accumulation": 2}))
    assert "batch_tokens: 1500" in str(caught.value)


def test_a_run_of_before_there_were_tokens_goes_on(settings):
    """What a setting that came later says of it is its default."""
    settings |= {"save_steps": 1, "epochs": 1}
    config = TrainConfig(**settings)
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(2)])
    noted = [*config.out.rglob("cachekd_settings.json"), *config.out.rglob("settings.json")]
    assert noted
    for file in noted:
        values = json.loads(file.read_text())
        del values["batch_tokens"]
        file.write_text(json.dumps(values))
    assert train(config).resumed_from > 0


def test_held_out_data_are_evaluated_by_tokens_too(by_tokens, tmp_path, unequal_data):
    held_out = {
        "eval_data": str(unequal_data),
        "lambda_align": 0.0,
        "lambda_vsd": 0.0,
        "cache": None,
        "teacher": None,
    }
    found = {}
    for name, changes in {"tokens": {}, "number": {"batch_tokens": None, "batch_size": 4}}.items():
        trainer = make_trainer(TrainConfig(**by_tokens | held_out | changes), tmp_path / name)
        sizes = [batch["input_ids"].numel() for batch in trainer.validation.batches(trainer.args)]
        found[name] = trainer.evaluate()["eval_loss"], sizes
    assert found["tokens"][0] == pytest.approx(found["number"][0], rel=1e-5)
    assert max(found["tokens"][1]) <= 1500 + 32
    assert len(found["tokens"][1]) < len(found["number"][1])


def test_the_estimate_has_a_batch_of_the_longest_samples(by_tokens):
    by_tokens |= {"lambda_align": 0.0, "lambda_vsd": 0.0, "cache": None, "teacher": None, "epochs": 1}
    found = estimate_training(TrainConfig(**by_tokens))
    samples, tokens = found.longest_batch
    assert 1500 / 2 < samples * tokens <= 1500 + 32
    assert found.settings["batch_tokens"] == 1500
    trainer = make_trainer(TrainConfig(**by_tokens), by_tokens["out"])
    assert found.steps == len(trainer.get_train_dataloader())


# ---- what is said


def test_one_of_the_two_is_counted():
    required = {"student": "s", "data": "d", "out": "o"}
    assert TrainConfig(**required).batch_size == defaults_of(TrainConfig)["batch_size"] == 16
    by_tokens = TrainConfig(**required, batch_tokens=4096)
    assert (by_tokens.batch_tokens, by_tokens.batch_size) == (4096, None)
    both = TrainConfig(**required, batch_tokens=4096, batch_size=8)
    assert (both.batch_tokens, both.batch_size) == (4096, 8)
    again = TrainConfig(**by_tokens.model_dump())
    assert again.deciding() == by_tokens.deciding()
    assert by_tokens.model_copy(update={"batch_tokens": None}).batch_size == 16


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_tokens": 0}, "greater than or equal to 1"),
        ({"batch_tokens": 8, "batch_size": 9}, "more than batch_tokens, 8"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(student="s", data="d", out="o", **changes)


@pytest.mark.parametrize(
    "training", [{"train_sampling_strategy": "group_by_length"}, {"dataloader_drop_last": True}]
)
def test_orders_and_batches_of_the_trainers_are_refused_beside_tokens(by_tokens, training):
    with pytest.raises(CachekdError, match=next(iter(training))) as caught:
        train(TrainConfig(**by_tokens, training=training))
    assert "batch_tokens" in plain_error(caught)
