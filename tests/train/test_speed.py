"""What makes stage two fast leaves its numbers as they are: vsd_every, groups of similar length, workers."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from torch.utils.data import BatchSampler

from cachekd.config import TrainConfig
from cachekd.data import SampleEncoder, open_samples, rough_lengths
from cachekd.errors import CachekdError
from cachekd.paths import RUN_FILE
from cachekd.train import callbacks, train
from cachekd.train.arguments import default_workers
from cachekd.train.callbacks import DataWait
from cachekd.train.open import make_trainer
from cachekd.train.order import LengthGroups, RandomOrder
from cachekd.train.run import last_terms
from runs import CutShort, losses
from tiny import tar_members, tiny_processor, unequal_members, write_tar


def entries(out: Path) -> list[dict]:
    log = json.loads((out / RUN_FILE).read_text())["log"]
    return [entry for entry in log if "ce" in entry]


# ---- the switched path in some steps only


def gradients(trainer) -> list[torch.Tensor]:
    """Of each optimizer step, unclipped, as one vector."""
    found = []

    def keep(_optimizer, _args, _kwargs):
        parameters = trainer.vlm.parameters()
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).clone())

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return found


def test_between_its_steps_the_switched_path_is_off_and_the_teacher_rests(settings, tmp_path):
    """Weights that do not move: so each step stands for itself, whatever was before it."""
    settings |= {"batch_size": 2, "gradient_accumulation": 2, "epochs": 2, "max_grad_norm": 0.0}
    settings |= {"learning_rate": 1e-30, "warmup": 0.0}
    runs, calls, logs = {}, [], {}
    for name, changed in {
        "some": {"vsd_every": 4},
        "every": {},
        "never": {"lambda_vsd": 0.0, "teacher": None},
    }.items():
        trainer = make_trainer(TrainConfig(**settings | changed), tmp_path / name)
        if name == "some":
            layer = trainer.teacher.model.model.language_model.layers[0]
            layer.register_forward_hook(lambda *_, of=trainer: calls.append(of.state.global_step))
        runs[name] = gradients(trainer)
        logs[name] = [entry for entry in trainer.state.log_history if "ce" in entry]
    assert calls == [0, 0, 0, 4, 4]  # tried; both batches of the first and of the fifth step
    for step, gradient in enumerate(runs["some"]):
        switched = step % 4 == 0
        expected, other = ("every", "never") if switched else ("never", "every")
        assert torch.equal(gradient, runs[expected][step])
        assert not torch.equal(gradient, runs[other][step])
        assert ("vsd" in logs["some"][step]) == switched
        if switched:
            assert logs["some"][step]["vsd"] == logs["every"][step]["vsd"]
        assert logs["some"][step]["loss"] == logs[expected][step]["loss"]


def test_the_logged_mean_is_over_the_tokens_of_the_steps_that_had_it(settings, tmp_path):
    settings |= {"learning_rate": 1e-30, "epochs": 1}
    whole = make_trainer(TrainConfig(**settings), tmp_path / "whole")
    whole.train()
    steps = [entry["vsd"] for entry in whole.state.log_history if "vsd" in entry]
    some = make_trainer(TrainConfig(**settings, vsd_every=3), tmp_path / "some")
    some.args.logging_steps, some.args.logging_first_step = 3, False
    some.state.logging_steps = 3
    some.train()
    assert len(steps) == 3
    assert last_terms(some.state)["vsd"] == pytest.approx(steps[0], rel=1e-6)


def test_a_live_teacher_rests_where_no_term_asks_for_it(settings, tmp_path):
    changed = {"live_teacher": True, "cache": None, "lambda_align": 0.0, "vsd_every": 3, "epochs": 1}
    trainer = make_trainer(TrainConfig(**settings | changed), tmp_path)
    calls = []
    layer = trainer.teacher.model.model.language_model.layers[0]
    layer.register_forward_hook(lambda *_: calls.append(trainer.state.global_step))
    trainer.train()
    assert trainer.state.global_step == 3
    assert calls == [0, 0] * 2  # its own path and the switched one: tried, and in the first step


@pytest.mark.parametrize(
    ("training", "workers"), [({}, 0), ({"train_sampling_strategy": "group_by_length"}, 0), ({}, 1)]
)
def test_resumed_in_the_middle_the_steps_are_the_same(settings, tmp_path, training, workers):
    """Cut in the second epoch, between two steps with the switched path."""
    settings |= {"vsd_every": 2, "save_steps": 2, "batch_size": 3, "training": training}
    settings |= {"epochs": 2 + workers}  # a worker reads on from the second into the third
    whole = TrainConfig(**settings | {"out": tmp_path / "whole"})
    train(whole)
    config = TrainConfig(**settings, workers=workers)
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(7)])
    assert train(config).resumed_from == 6

    def terms(out: Path) -> list[dict]:
        return [{name: entry.get(name) for name in ("loss", "ce", "align", "vsd")} for entry in entries(out)]

    assert terms(config.out) == terms(whole.out)
    assert [entry["vsd"] is not None for entry in terms(whole.out)] == [True, False] * 2 * (2 + workers)


# ---- samples of similar length


def padding(trainer) -> tuple[float, list[str]]:
    """The share of padding, counted in the batches that the Trainer makes, and the order of the samples."""
    padded, cells, keys = 0, 0, []
    for batch in trainer.get_train_dataloader():
        padded += int((batch["attention_mask"] == 0).sum())
        cells += batch["attention_mask"].numel()
        keys += batch.keys
    return padded / cells, keys


def test_grouping_by_length_pads_less_and_leaves_nothing_out(settings, tmp_path, unequal_data):
    settings |= {"data": str(unequal_data), "cache": None, "teacher": None, "batch_size": 4}
    settings |= {"lambda_align": 0.0, "lambda_vsd": 0.0}
    shares, orders = {}, {}
    for strategy in ("random", "group_by_length"):
        training = {"train_sampling_strategy": strategy}
        trainer = make_trainer(TrainConfig(**settings, training=training), tmp_path / strategy)
        shares[strategy], orders[strategy] = padding(trainer)
        assert sorted(orders[strategy]) == trainer.train_dataset.samples.keys
    assert shares["random"] > 0.25
    assert shares["group_by_length"] < shares["random"] / 3
    again = make_trainer(TrainConfig(**settings, training=training), tmp_path / "again")
    torch.rand(5)  # the global random state is nothing to it
    assert padding(again)[1] == orders["group_by_length"]
    again.state.epoch = 1.0
    assert padding(again)[1] != orders["group_by_length"]


@pytest.fixture(scope="module")
def forms(unequal_data, tmp_path_factory) -> dict[str, str]:
    """The same samples as tars, LLaVA JSON and a Hugging Face data set."""
    import datasets

    folder = tmp_path_factory.mktemp("forms")
    files = dict(unequal_members(96))
    records = []
    for name in sorted(files):
        if name.endswith(".json"):
            key = name.removesuffix(".json")
            (folder / f"{key}.png").write_bytes(files[f"{key}.png"])
            records.append({"id": key, "image": f"{key}.png", **json.loads(files[name])})
    (folder / "data.json").write_text(json.dumps(records))
    rows = [record | {"image": {"bytes": files[record["image"]], "path": None}} for record in records]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "hf")
    return {"tars": str(unequal_data), "json": str(folder / "data.json"), "hf": str(folder / "hf")}


@pytest.mark.parametrize("form", ["tars", "json", "hf"])
def test_rough_lengths_open_a_few_images_and_are_near_the_true_ones(forms, form, monkeypatch):
    samples, encoder = open_samples(forms[form]), SampleEncoder(tiny_processor())
    true = torch.tensor([len(encoder(samples[index])) for index in range(len(samples))])
    opened = []
    import cachekd.data.records as records

    real = records.open_image
    monkeypatch.setattr(records, "open_image", lambda *a, **k: opened.append(1) or real(*a, **k))
    rough = torch.tensor(rough_lengths(samples, encoder))
    assert len(opened) == 16
    assert (rough - true).abs().max() <= 4
    assert true.max() > 3 * true.min()


def test_a_map_function_is_asked_for_outlines_too(forms, tmp_path, monkeypatch):
    (tmp_path / "shorter.py").write_text(
        "def shorter(record):\n    return {**record, 'conversations': record['conversations'][:2]}\n"
    )
    monkeypatch.chdir(tmp_path)
    samples = open_samples(forms["json"], map="shorter:shorter", limit=5, shuffle_seed=1)
    assert [len(samples.preview(index).texts) for index in range(5)] == [2] * 5
    assert [samples.preview(index).images for index in range(5)] == [1] * 5


def test_an_optimizer_step_has_samples_of_similar_length():
    lengths = torch.randint(10, 500, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroups(lengths, 8, seed=3, epoch=lambda: 0)
    order = list(sampler)
    assert sorted(order) == list(range(400))
    spreads = [
        max(some) - min(some)
        for some in ([lengths[i] for i in order[start : start + 8]] for start in range(8, 400, 8))
    ]
    assert sorted(spreads)[len(spreads) // 2] < 60
    assert list(sampler) == order != list(LengthGroups(lengths, 8, seed=4, epoch=lambda: 0))


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_processes_share_one_order_also_after_resuming(settings, tmp_path, strategy):
    """What accelerate makes of the trainer's sampler for each of two processes, in the second epoch, whatever
    their random states."""
    config = TrainConfig(**settings, training={"train_sampling_strategy": strategy})
    trainer = make_trainer(config, tmp_path / "t")
    first, batches = list(trainer._get_train_sampler()), []
    trainer.state.epoch = 1.25
    for rank in range(2):
        torch.manual_seed(rank)
        shard = BatchSamplerShard(BatchSampler(trainer._get_train_sampler(), 2, drop_last=False), 2, rank)
        batches.append(list(shard))
        torch.rand(rank + 3)
        assert list(SkipBatchSampler(shard, 2)) == batches[rank][2:]
    order = [index for pair in zip(*batches, strict=True) for batch in pair for index in batch]
    assert sorted(order) == sorted(first) == list(range(12))
    assert order != first


def test_the_random_order_is_accelerates():
    for epoch in range(3):
        theirs = SeedableRandomSampler(range(48), data_seed=7)
        theirs.set_epoch(epoch)
        assert list(RandomOrder(48, seed=7, epoch=lambda: epoch)) == list(theirs)  # noqa: B023


def test_a_strategy_that_would_not_work_is_refused(settings):
    with pytest.raises(CachekdError, match="cannot be 'batch_rebalance'") as caught:
        train(TrainConfig(**settings, training={"train_sampling_strategy": "batch_rebalance"}))
    assert "group_by_length" in str(caught.value)


# ---- workers


@pytest.fixture(params=["fork", "spawn"])
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_workers_give_the_same_losses(settings, tmp_path, start_method):
    settings |= {"training": {"max_steps": 2}, "batch_size": 3}
    train(TrainConfig(**settings | {"out": tmp_path / "here", "workers": 0}))
    train(TrainConfig(**settings | {"workers": 1}))
    assert losses(settings["out"]) == losses(tmp_path / "here")
    assert len(losses(settings["out"])) == 2


def test_workers_read_on_into_the_next_epoch(settings, tmp_path):
    """In its own order; they have begun it when the last step of this one is computed."""
    keys: dict[int, list[list[str]]] = {}
    begun = []
    for workers in (0, 1):
        config = TrainConfig(**settings | {"epochs": 3, "batch_size": 5, "workers": workers})
        trainer = make_trainer(config, tmp_path / str(workers))
        compute = trainer.compute_loss

        def seen(model, inputs, *args, of=trainer, does=compute, at=workers, **kwargs):
            keys.setdefault(at, []).append(inputs.keys)
            if at == 1:
                begun.append(of._reader._begun is not None)
            return does(model, inputs, *args, **kwargs)

        trainer.compute_loss = seen
        trainer.train()
        assert not multiprocessing.active_children()
    assert keys[1] == keys[0]
    epochs = [list(chain(*keys[1][start : start + 3])) for start in (0, 3, 6)]
    assert all(sorted(epoch) == trainer.train_dataset.samples.keys for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert begun == [False, False, True] * 2 + [False] * 3


def test_a_workers_fault_is_the_samples(settings, tmp_path):
    """As if it had been read here, without a DataLoader's traceback."""
    members = tar_members(12)
    members[7] = (members[7][0], members[7][1].replace(b"red", b"blue").replace(b"yes", b"maybe"))
    write_tar(tmp_path / "changed" / "0.tar", members)
    settings |= {"data": str(tmp_path / "changed")}
    texts = []
    for workers in (0, 1):
        with pytest.raises(CachekdError, match="answer tokens differ") as caught:
            train(TrainConfig(**settings, workers=workers))
        assert not multiprocessing.active_children()  # though the error has hold of all
        assert type(caught.value) is CachekdError
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert "Traceback" not in texts[0]


def test_the_default_leaves_a_cpu_to_the_steps(monkeypatch):
    assert default_workers(on_gpu=False) == 0
    for cores, processes, expected in ((16, 1, 4), (4, 1, 3), (1, 1, 1), (16, 8, 1)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_workers(on_gpu=True) == expected


# ---- waiting


def test_the_share_of_waiting_is_measured():
    """Batches that take 30 ms beside steps that take 10 ms; the first is not counted."""

    def slow():
        for index in range(5):
            time.sleep(0.3 if index == 0 else 0.03)
            yield index

    clock, seen = DataWait(), []
    for batch in clock.timed(slow()):
        seen.append(batch)
        time.sleep(0.01)
    assert seen == [0, 1, 2, 3, 4]
    assert clock.total.waited >= 4 * 0.03
    assert clock.total.elapsed - clock.total.waited >= 5 * 0.01
    assert clock.total.elapsed < clock.total.waited + 0.3  # the first batch's time is in neither
    first = clock.since_last()
    assert first.waited == clock.total.waited
    assert clock.since_last().waited == 0


def test_data_that_comes_late_is_logged_and_warned_of(settings, caplog, monkeypatch):
    from cachekd.train import TrainingSamples

    real = TrainingSamples._example

    def late(self, index):
        time.sleep(0.1)
        return real(self, index)

    monkeypatch.setattr(TrainingSamples, "_example", late)
    monkeypatch.setattr(callbacks, "FEWEST_STEPS", 4)
    monkeypatch.setattr(callbacks, "SHORTEST", 0.5)
    monkeypatch.setattr(callbacks, "usable_cores", lambda: 8)
    with caplog.at_level("WARNING", logger="cachekd.train.run"):
        summary = train(TrainConfig(**settings | {"epochs": 1, "batch_size": 3}))
    run = json.loads((settings["out"] / RUN_FILE).read_text())
    assert 0.02 < summary.data_wait == run["data_wait"] < 1
    assert all(0 <= entry["data_wait"] <= 1 for entry in entries(settings["out"]))
    assert max(entry["data_wait"] for entry in entries(settings["out"])) > 0.02
    assert "--workers 2" in caplog.text


def test_no_more_workers_are_advised_than_there_are_cores(monkeypatch):
    def advised(workers: int, cores: int, **changed: float) -> str | None:
        monkeypatch.setattr(callbacks, "usable_cores", lambda: cores)
        return callbacks.advice(**{"share": 0.3, "workers": workers, "steps": 100, "seconds": 60.0} | changed)

    assert "--workers 4 reads" in str(advised(2, 8))
    assert "--workers 3 reads" in str(advised(2, 4))
    assert "--workers 1 reads" in str(advised(0, 2))
    assert [advised(workers, cores) for workers, cores in ((2, 1), (1, 2), (2, 3), (0, 1), (4, 4))] == [
        None
    ] * 5
    assert advised(2, 8, share=0.01) is advised(2, 8, steps=19) is advised(2, 8, seconds=2.0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="cores are bound on Linux")
def test_cores_are_those_that_this_process_may_run_on(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 5, 6})
    assert callbacks.usable_cores() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert callbacks.usable_cores() == 1
