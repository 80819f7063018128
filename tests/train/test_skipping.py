"""What the dump left out, or what is broken, is left out of training and evaluations: counted and named."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.check.bind import bind
from cachekd.config import DataOptions, TrainConfig
from cachekd.data import Limits, SampleEncoder, collate, open_samples, predicting_positions
from cachekd.data.left_out import BadSamples, LeftOutSamples
from cachekd.errors import BadSample, CachekdError
from cachekd.evaluate import read_scores
from cachekd.evaluate.questions import questions_of
from cachekd.losses import cross_entropy_loss, dbild_loss
from cachekd.models import load_model, load_processor, logits_at
from cachekd.paths import RUN_FILE
from cachekd.train import TrainingSamples, train
from cachekd.train.estimate import estimate_training
from cachekd.train.folder import CHECKPOINTS
from cachekd.train.open import make_trainer, open_run
from cachekd.train.order import RandomOrder
from cachekd_cli.main import app
from caches import dump_cache
from launch import train_in_two_processes
from tiny import checked, evaluated, tar_members, tiny_processor, write_llava_json, write_tar

CPU = torch.device("cpu")
BROKEN = (1, 4, 6, 9)  # of 12; with this seed one batch of two has nothing else


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The samples that `cache_path` has, some pictures broken since."""
    members = tar_members(12)
    for index in BROKEN:
        members[2 * index] = (members[2 * index][0], b"not a png")
    return write_tar(tmp_path_factory.mktemp("broken-since") / "0.tar", members)


@pytest.fixture
def settings(student_path, teacher_path, cache_path, broken) -> dict[str, Any]:
    return {
        "student": str(student_path),
        "teacher": str(teacher_path),
        "cache": str(cache_path),
        "data": str(broken),
        "batch_size": 2,
        "epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "on_error": "skip",
        # As large as the steps are: Adam divides a gradient by its own size, and rounding with it.
        "training": {"optim": "sgd", "lr_scheduler_type": "constant"},
        "warmup": 0.0,
        "max_grad_norm": 0.0,
    }


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / RUN_FILE).read_text())


def batches_of(epoch: int, size: int) -> list[list[int]]:
    order = list(RandomOrder(12, seed=0, epoch=lambda: epoch))
    return [order[start : start + size] for start in range(0, 12, size)]


def reference(settings: dict[str, Any], in_a_step: int) -> dict[str, torch.Tensor]:
    """The student's weights after plain descent over the good samples of each step, one sample at a time.

    Whole models, whole logits, no Trainer. A step's loss is the mean over the answer tokens that are there.
    """
    student = load_model(settings["student"], dtype=torch.float32, device=CPU)
    teacher = load_model(settings["teacher"], dtype=torch.float32, device=CPU).requires_grad_(False)
    teacher.model.vision_tower = student.model.vision_tower
    samples, cache = open_samples(settings["data"]), LogitCache(settings["cache"])
    encoder = SampleEncoder(load_processor(settings["student"]))
    weights = list(student.parameters())
    for step in (some for epoch in range(settings["epochs"]) for some in batches_of(epoch, in_a_step)):
        total, tokens = torch.zeros(()), 0
        for index in step:
            if index in BROKEN:
                continue
            batch = collate([encoder(samples[index])], 0)
            supervised = batch.pop("supervised")
            targets, positions = cache[samples.keys[index]], predicting_positions(supervised)
            kneedle = {"window": targets.window, "min_k": targets.min_k, "reduction": "sum"}
            own, switched = (logits_at(model, batch, positions) for model in (student, teacher))
            total = total + cross_entropy_loss(own, targets.token_ids, reduction="sum")
            for logits in (own, switched):
                total = total + dbild_loss(
                    logits[:, : targets.vocab_size], targets, temperature=3.0, **kneedle
                )
            tokens += len(targets.token_ids)
        if tokens:
            gradients = torch.autograd.grad(total / tokens, weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight.data -= settings["learning_rate"] * gradient
    return student.state_dict()


def assert_close(out: Path, expected: dict[str, torch.Tensor], start: Path) -> None:
    found = load_model(str(out), dtype=torch.float32, device=CPU).state_dict()
    before = load_model(str(start), dtype=torch.float32, device=CPU).state_dict()
    moved = max(float((expected[name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-4
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-3 * moved, msg=name)


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_training_without_broken_samples_is_that_over_the_others(settings, tmp_path, accumulation, workers):
    """Steps of the same samples less the broken ones, one of them with nothing left."""
    empty = [set(batch) <= {*BROKEN} for epoch in range(2) for batch in batches_of(epoch, 2)]
    assert any(empty)
    settings |= {"gradient_accumulation": accumulation, "workers": workers, "out": tmp_path / "run"}
    summary = train(TrainConfig(**settings))
    assert summary.steps == 12 // accumulation
    assert_close(tmp_path / "run", reference(settings, 2 * accumulation), settings["student"])
    keys = {f"s{index:03d}" for index in BROKEN}
    assert (summary.bad.samples, set(summary.bad.first)) == (4, keys)  # each once, in two epochs
    assert "cannot be read" in summary.bad.first["s001"]
    assert record_of(tmp_path / "run")["left_out"] == {
        "missing": {"samples": 0, "first": {}},
        "bad": {"samples": 4, "first": summary.bad.first},
    }


@pytest.mark.parametrize("live", [False, True])
def test_a_batch_of_nothing_contributes_exactly_zero(settings, tmp_path, live):
    """Every parameter that has a gradient has one all the same, so that processes keep in step."""
    changed = {"live_teacher": live, "cache": None if live else settings["cache"], "out": tmp_path / "run"}
    trainer = make_trainer(TrainConfig(**settings | changed), tmp_path / "t")
    gradients = []
    for index in (0, BROKEN[0]):
        batch = trainer.data_collator([trainer.train_dataset[index]])
        assert batch.left_out.keys() == ({"s001"} if index else set())
        loss = trainer.compute_loss(
            trainer.model, batch, num_items_in_batch=torch.tensor(5 - 5 * bool(index))
        )
        loss.backward()
        gradients.append({n: p.grad for n, p in trainer.vlm.named_parameters() if p.grad is not None})
        trainer.vlm.zero_grad()
    good, none = gradients
    assert loss == 0
    assert batch.keys == []
    assert good.keys() == none.keys()
    assert any(gradient.any() for gradient in good.values())
    assert not any(gradient.any() for gradient in none.values())


def test_samples_of_similar_length_without_broken_ones(settings, tmp_path):
    settings |= {"out": tmp_path / "run", "epochs": 1}
    settings["training"] |= {"train_sampling_strategy": "group_by_length"}
    assert train(TrainConfig(**settings)).bad.samples == 4


def test_a_run_that_goes_on_counts_the_same_samples(settings, tmp_path):
    """From its last checkpoint it does not read again what it left out before."""
    settings |= {"save_steps": 8, "out": tmp_path / "run", "keep_checkpoints": True}
    whole = train(TrainConfig(**settings))
    student = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / RUN_FILE).unlink()  # as a run that was killed after its eighth step leaves it
    (tmp_path / "run" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS / "checkpoint-12")
    resumed = train(TrainConfig(**settings))
    assert resumed.resumed_from == 8
    assert resumed.bad == whole.bad
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == student


def test_a_run_that_a_bad_sample_stopped_goes_on_without_it(settings, tmp_path):
    settings |= {"out": tmp_path / "run", "save_steps": 1}
    with pytest.raises(CachekdError, match="cannot be read"):
        train(TrainConfig(**settings | {"on_error": "stop"}))
    assert train(TrainConfig(**settings)).bad.samples == 4


def test_each_is_logged_once_and_many_are_not(caplog):
    bad = BadSamples()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for index in range(13):
                bad.note(f"s{index:03d}", BadSample("broken", found="no png"))
    assert Counter(line.split(" is ")[0] for line in caplog.messages) == Counter(
        [
            *(f"sample 's{index:03d}'" for index in range(10)),
            "more samples are left out; they are counted, and named at the end",
        ]
    )
    assert len(bad.reasons) == 13


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_have_gone_stop_the_run(student_path, tmp_path, workers):
    """In the middle of it: 16 samples in a row are bad, and so is by now one that was good."""
    data = write_llava_json(tmp_path / "data", 40)

    class Vanish(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for image in data.parent.glob("*.png"):
                image.unlink()

    config = TrainConfig(
        student=str(student_path), data=data, out=tmp_path / "run", batch_size=4, on_error="skip",
        lambda_align=0, lambda_vsd=0, workers=workers,
    )  # fmt: skip
    with pytest.raises(CachekdError, match="one that was good is bad now, so the data have probably gone"):
        train(config, [Vanish()])


def test_data_of_which_all_is_bad_do_not_begin(student_path, tmp_path):
    data = write_llava_json(tmp_path / "data", 40)
    for image in data.parent.glob("*.png"):
        image.unlink()
    plain = {"student": str(student_path), "lambda_align": 0, "lambda_vsd": 0, "on_error": "skip"}
    with pytest.raises(
        CachekdError, match=r"no sample can be used[\s\S]*40 of 40 .* in vain[\s\S]*is missing"
    ):
        train(TrainConfig(**plain, data=data, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_stale_is_never_left_out(settings, tmp_path):
    members = tar_members(12)
    members[7] = (members[7][0], members[7][1].replace(b"red", b"blue").replace(b"yes", b"maybe"))
    settings |= {"data": write_tar(tmp_path / "changed" / "0.tar", members), "out": tmp_path / "run"}
    with pytest.raises(CachekdError, match="answer tokens differ"):
        train(TrainConfig(**settings))


def test_an_estimate_is_of_good_samples(settings, tmp_path):
    settings |= {"out": tmp_path / "run", "batch_size": 8}
    found = estimate_training(TrainConfig(**settings))
    assert found.longest_batch[0] == 8


def test_two_processes_without_broken_samples_equal_one(settings, tmp_path):
    """One of them has steps with nothing left; both make as many forwards, and each names its own."""
    # Batch b of an epoch goes to process b % 2.
    lonely = [set(batch) <= {*BROKEN} for epoch in range(2) for batch in batches_of(epoch, 2)]
    assert any(lonely)
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps(settings | {"out": str(tmp_path / "two"), "workers": 1}))
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(tmp_path / "two", reference(settings, 4), settings["student"])
    assert set(record_of(tmp_path / "two")["left_out"]["bad"]["first"]) == {f"s{i:03d}" for i in BROKEN}
    assert "left out: 4 samples that cannot be used" in done.stdout


# ---- samples that the cache lacks


def test_samples_that_the_dump_left_out_are_left_out(
    student_path, teacher_path, skipping_cache, broken_data, tmp_path
):
    """The whole way of the issue: `dump --on-error skip`, then the same data."""
    config = TrainConfig(
        student=str(student_path), teacher=str(teacher_path), cache=str(skipping_cache), data=broken_data,
        missing="skip", out=tmp_path / "run", batch_size=4,
    )  # fmt: skip
    summary = train(config)
    assert (summary.steps, summary.uncovered, summary.bad.samples) == (4, 0, 0)  # 13 samples
    assert [*summary.missing.first] == [f"s{index:03d}" for index in (7, 12, 13, 14, 15, 16, 17)]
    assert "the dump left it out: the image" in summary.missing.first["s007"]
    assert record_of(tmp_path / "run")["left_out"]["missing"]["samples"] == 7


def test_training_without_missing_samples_is_that_on_the_others(settings, tmp_path):
    """Bit by bit that on data which do not have them."""
    more = write_tar(tmp_path / "more" / "0.tar", tar_members(14))
    same = write_tar(tmp_path / "same" / "0.tar", tar_members(12))
    students = []
    for name, data, missing in (("a", more, "skip"), ("b", same, "error")):
        train(TrainConfig(**settings | {"data": str(data), "missing": missing, "out": tmp_path / name}))
        students.append((tmp_path / name / "model.safetensors").read_bytes())
    assert students[0] == students[1]
    assert record_of(tmp_path / "a")["left_out"]["missing"] == {
        "samples": 2,
        "first": {"s012": "the cache lacks it", "s013": "the cache lacks it"},
    }


def test_a_cache_with_none_of_the_data_is_refused(settings, tmp_path):
    other = write_tar(tmp_path / "other" / "0.tar", tar_members(3, start=20))
    with pytest.raises(CachekdError, match="it has none of them, and nothing would be left"):
        make_trainer(
            TrainConfig(**settings | {"data": str(other), "missing": "skip", "out": tmp_path / "r"}), tmp_path
        )


def test_unbound_samples_are_left_out(settings, tmp_path):
    """The binding's own reason is the same: the cache has nothing of them."""
    members = [(f"x{name}", content) for name, content in tar_members(13)]
    data, binding = write_tar(tmp_path / "renamed" / "0.tar", members), tmp_path / "binding.json"
    cache = LogitCache(settings["cache"])
    bind(cache, open_samples(data)).write(binding, cache, str(data))
    settings |= {
        "data": str(data),
        "binding": binding,
        "missing": "skip",
        "out": tmp_path / "run",
        "epochs": 1,
    }
    assert train(TrainConfig(**settings)).missing == LeftOutSamples(1, {"xs012": "the cache lacks it"})


# ---- the message advises what will work


@pytest.fixture
def dumped(teacher_path, data_path, tmp_path):
    """Dumps a part of what `data_path` has."""

    def make(name: str, **settings: Any) -> str:
        out = dump_cache(tmp_path / name, teacher_path, data_path, tail="none", **settings)
        return str(out)

    return make


def refused(settings: dict[str, Any], scratch: Path, *, all_of_them: bool = False) -> str:
    with pytest.raises(CachekdError, match="the cache lacks samples of the data set") as caught:
        make_trainer(TrainConfig(**settings), scratch)
    # Where all are missing, nothing would be left.
    assert ("--missing skip" in str(caught.value)) == (not all_of_them)
    return str(caught.value)


def test_check_takes_a_cache_that_lacks_samples_for_a_reason(settings, dumped, data_path, tmp_path):
    """What the dump left out, or did not come to, is a note; what nobody knows of is not."""
    pair = (settings["teacher"], settings["student"])
    cut = {"max_tokens": 40, "too_long": "skip"}
    for name, options, told in (
        ("limit", {"limit": 7}, "beyond its --limit 7"),
        ("skip", cut, "the dump left"),
    ):
        report = checked(*pair, DataOptions.of(data_path, **cut), cache=dumped(name, **options))
        (row,) = (row for row in report.rows if row.name == "cache: lacks")
        assert (row.state, told in row.found, report.fits) == ("note", True, True)
    report = checked(*pair, DataOptions.of(data_path, key="index"), cache=str(settings["cache"]))
    assert not report.fits


@pytest.mark.parametrize("seed", [None, 3])
def test_beyond_a_limit(settings, dumped, data_path, tmp_path, seed):
    settings |= {"cache": dumped("c", limit=7, shuffle_seed=seed), "data": data_path, "out": tmp_path / "run"}
    part = "--limit 7" if seed is None else "--limit 7 --shuffle-seed 3"
    text = refused(settings, tmp_path)
    assert f"5 are beyond its {part}" in text
    assert f"{part} is the part that was dumped" in text
    settings |= {"limit": 7, "shuffle_seed": seed}
    assert len(make_trainer(TrainConfig(**settings), tmp_path).train_dataset) == 7
    found = open_run(
        TrainConfig(**settings | {"limit": 9, "missing": "skip"}), tmp_path, lambda _: None
    ).missing
    assert set(found.first.values()) == {f"it is beyond the dump's {part}"}
    assert (found.samples, len(found.first)) == (2, 2)


def test_left_out_by_the_dump_and_beyond_its_limit(settings, teacher_path, broken_data, tmp_path):
    cache = dump_cache(tmp_path / "c", teacher_path, broken_data, tail="none", limit=9, on_error="skip")
    settings |= {"cache": str(cache), "data": broken_data, "out": tmp_path / "run"}
    text = refused(settings, tmp_path)
    assert "12 are missing, the first is 's007'" in text
    assert "the dump left 1 out, such as 's007': the image" in text
    assert "11 are beyond its --limit 9" in text
    text = refused(settings | {"limit": 9}, tmp_path)
    assert "--missing ce-only" not in text  # it cannot be read for that either
    assert "or mend what was left out, and dump these data into a new folder" in text
    assert len(make_trainer(TrainConfig(**settings | {"missing": "skip"}), tmp_path).train_dataset) == 8


@pytest.fixture
def no_weights(monkeypatch):
    for name in ("load_student", "load_teacher"):
        monkeypatch.setattr(f"cachekd.train.open.{name}", None)


def test_training_by_l_ce_alone_what_the_dump_found_bad_is_refused(
    settings, skipping_cache, broken_data, tmp_path, no_weights
):
    """It would stop at the first of them, hours later."""
    settings |= {"cache": str(skipping_cache), "data": broken_data, "out": tmp_path / "run"}
    settings |= {"missing": "ce-only", "on_error": "stop"}
    with pytest.raises(CachekdError, match="training them by L_CE alone would stop at them") as caught:
        train(TrainConfig(**settings))
    assert "7 of them, such as 's007': the image" in str(caught.value.found)
    assert "add --on-error skip" in str(caught.value.fix)


def test_what_is_advised_works(settings, teacher_path, broken_data, tmp_path):
    cache = dump_cache(tmp_path / "c", teacher_path, broken_data, tail="none", limit=9, on_error="skip")
    settings |= {"cache": str(cache), "data": broken_data, "out": tmp_path / "run", "epochs": 1}
    text = refused(settings | {"on_error": "stop"}, tmp_path)
    assert "--missing ce-only --on-error skip trains by L_CE alone those that can be read" in text
    summary = train(TrainConfig(**settings | {"missing": "ce-only", "on_error": "skip"}))
    assert (summary.uncovered, summary.bad.samples) == (5, 7)  # of the other 12 none can be read but 5


def test_what_the_dump_left_out_for_its_length_needs_no_other_option(
    settings, teacher_path, data_path, tmp_path
):
    """The run leaves it out for the same reason, as nothing else is said."""
    lengths = {"max_tokens": 40, "too_long": "skip"}
    cache = dump_cache(tmp_path / "c", teacher_path, data_path, tail="none", **lengths)
    too_long = 12 - len(LogitCache(cache))
    assert 0 < too_long < 12
    settings |= {"cache": str(cache), "data": str(data_path), "on_error": "stop", "missing": "ce-only"}
    settings |= {"epochs": 1, "out": tmp_path / "run"}
    assert train(TrainConfig(**settings)).bad.samples == too_long
    with pytest.raises(CachekdError, match=r"would stop at them[\s\S]*the sample is too long"):
        make_trainer(TrainConfig(**settings | {"too_long": "error"}), tmp_path)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"key": "index"}, {}, "--key was index for the dump, and is not given here"),
        ({}, {"key": "index"}, "--key was not given for the dump, and is index here"),
        ({"limit": 3}, {"shuffle_seed": 1}, "--shuffle-seed was not given for the dump, and is 1 here"),
    ],
)
def test_read_otherwise(settings, teacher_path, tmp_path, theirs, ours, said):
    data = write_llava_json(tmp_path / "data", 6)
    cache = dump_cache(tmp_path / "c", teacher_path, data, tail="none", **theirs)
    settings |= {"cache": str(cache), "data": data, "out": tmp_path / "run", **ours}
    text = refused(settings, tmp_path, all_of_them="key" in {**theirs, **ours})
    assert said in text
    assert "or read the data as the dump did" in text
    assert "cachekd bind" not in text


# ---- samples that are too long


def test_samples_that_are_too_long_are_left_out_though_bad_ones_stop(settings, data_path, tmp_path):
    """As `--too-long skip` says."""
    settings |= {"data": str(data_path), "on_error": "stop", "epochs": 1, "out": tmp_path / "run"}
    samples, encoder = open_samples(data_path), SampleEncoder(tiny_processor())
    lengths = [len(encoder(samples[index])) for index in range(12)]
    most = sorted(lengths)[2]
    long = {key for key, length in zip(samples.keys, lengths, strict=True) if length > most}
    with pytest.raises(BadSample, match="too long"):
        train(TrainConfig(**settings | {"max_tokens": most}))
    found = train(TrainConfig(**settings | {"max_tokens": most, "too_long": "skip"}))
    assert {*found.bad.first} == long
    assert len(long) >= 8
    models, data = [settings["student"]], {"data": data_path, "max_tokens": most}
    with pytest.raises(BadSample, match="too long"):
        evaluated(models, **data)
    # Its questions are asked alone, and are shorter than the whole.
    assert evaluated(models, **data, too_long="skip").asked.left_out.samples < len(long)


def test_a_run_cuts_where_its_cache_did(settings, teacher_path, data_path, tmp_path, caplog):
    """Nothing has to be said again; what is said otherwise is no changed sample, and the message says so."""
    cut = {"max_tokens": 40, "too_long": "cut"}
    cache = dump_cache(tmp_path / "c", teacher_path, data_path, tail="none", on_error="skip", **cut)
    settings |= {"cache": str(cache), "data": str(data_path), "missing": "skip", "epochs": 1}
    with caplog.at_level(logging.WARNING):
        unsaid = train(TrainConfig(**settings | {"out": tmp_path / "unsaid"}))
    assert "samples of more than 40 tokens (--max-tokens) lose the end of their answers" in caplog.text
    run = json.loads((tmp_path / "unsaid" / RUN_FILE).read_text())
    assert run["limits"] == {"max_tokens": 40, "too_long": "cut"}
    said = train(TrainConfig(**settings | cut | {"out": tmp_path / "said"}))
    assert unsaid.terms == said.terms
    with pytest.raises(
        CachekdError, match=r"answer tokens differ[\s\S]*say the same --max-tokens and --too-long"
    ):
        train(TrainConfig(**settings | {"out": tmp_path / "run", "too_long": "error", "max_tokens": 999}))


def test_what_only_one_side_cut_is_cut_on_both(teacher_path, data_path, tmp_path):
    """The student reads fewer tokens than the teacher did, or more: what both have is aligned."""
    cut = {"max_tokens": 40, "too_long": "cut", "tail": "none"}
    cache = LogitCache(dump_cache(tmp_path / "c", teacher_path, data_path, on_error="skip", **cut))
    samples, processor = open_samples(data_path), load_processor(str(teacher_path))
    shorter = 0
    for index, key in enumerate(samples.keys):
        if key not in cache:
            continue
        whole = SampleEncoder(processor)(samples[index])
        for most in (36, 40, 44):
            encoder = SampleEncoder(processor, Limits(most, too_long="cut"))
            try:
                example = TrainingSamples(samples, encoder, cache)[index]
            except BadSample:  # cut that short, nothing would be left
                continue
            tokens = example.encoded.token_ids
            assert tokens.tolist() == whole.token_ids[: len(tokens)].tolist()
            alone = encoder(samples[index]).token_ids
            assert len(tokens) == len(example.targets) == min(len(cache[key]), len(alone))
            assert torch.equal(example.targets.logprobs, cache[key].logprobs[: len(tokens)])
            assert len(example.encoded.inputs["input_ids"]) == len(example.encoded.supervised) <= most
            shorter += len(tokens) < len(cache[key])
    assert shorter > 0


# ---- samples that feed no term


def test_l_vsd_that_no_sample_feeds_is_refused_before_any_weights(
    settings, teacher_path, tmp_path, monkeypatch
):
    """Text alone; and a picture that only a sample has of which the cache has nothing."""
    data = write_llava_json(tmp_path / "data", 5)
    records = json.loads(data.read_text())
    for record in records[:4]:
        record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")
        del record["image"]
    data.write_text(json.dumps(records))
    cache = dump_cache(tmp_path / "c", teacher_path, data, tail="none", limit=4)
    monkeypatch.setattr("cachekd.train.open.load_student", None)
    monkeypatch.setattr("cachekd.train.open.load_teacher", None)
    settings |= {"cache": str(cache), "data": str(data), "out": tmp_path / "run"}
    for more in ({"limit": 4}, {"missing": "skip"}, {"missing": "ce-only"}):
        with pytest.raises(
            CachekdError, match=r"no sample feeds L_VSD[\s\S]*4 of text alone[\s\S]*--lambda-vsd 0"
        ):
            train(TrainConfig(**settings | more))
    monkeypatch.undo()
    assert train(TrainConfig(**settings | {"limit": 4, "lambda_vsd": 0})).steps == 4


# ---- evaluations


def test_an_evaluation_without_broken_samples_is_that_of_the_others(
    student_path, teacher_path, broken, tmp_path
):
    members = tar_members(12)
    good = [
        member for index in range(12) if index not in BROKEN for member in members[2 * index : 2 * index + 2]
    ]
    rest = write_tar(tmp_path / "rest" / "0.tar", good)
    models, settings = [str(student_path)], {"teacher": str(teacher_path), "batch_size": 5}
    with pytest.raises(CachekdError, match="cannot be read"):
        evaluated(models, broken, **settings)
    progress = []
    found = evaluated(
        models, broken, progress=lambda *done: progress.append(done), on_error="skip", **settings
    )
    expected = evaluated(models, rest, **settings)
    assert found.asked.left_out.samples == 4
    assert "cannot be read" in found.asked.left_out.first["s001"]
    found.asked.data, found.asked.left_out = expected.asked.data, LeftOutSamples()
    assert found == expected
    for model in (*models, str(teacher_path)):
        assert sum(samples for name, _, samples, _ in progress if name == model) == 12


def test_an_evaluation_scores_no_half_answers(student_path, data_path):
    """Where a dump cuts samples, an evaluation leaves them out."""
    samples, encoder = open_samples(data_path), SampleEncoder(tiny_processor())
    asked = {key: questions_of(samples[index]) for index, key in enumerate(samples.keys)}
    longest = {key: max(len(encoder(one)) for one in questions) for key, questions in asked.items()}
    most = max(longest.values()) - 1  # an answer's end would be cut off
    long = {key for key, tokens in longest.items() if tokens > most}
    models, data = [str(student_path)], {"data": data_path, "max_tokens": most}
    cut, skipped = (evaluated(models, **data, too_long=name) for name in ("cut", "skip"))
    assert cut == skipped
    assert {*cut.asked.left_out.first} == long
    assert all(reason.startswith("the sample is too long: ") for reason in cut.asked.left_out.first.values())
    assert cut.asked.questions == sum(len(questions) for key, questions in asked.items() if key not in long)


def test_an_evaluation_says_what_it_left_out(student_path, broken, tmp_path):
    run = shutil.copytree(student_path, tmp_path / "run")
    (run / RUN_FILE).write_text("{}")
    done = CliRunner().invoke(app, ["eval", str(run), "--data", str(broken), "--on-error", "skip"])
    assert done.exit_code == 0, done.output
    assert "left out: 4 samples that cannot be used" in done.stdout
    assert "s001: the image" in done.stdout
    [record] = read_scores(run)
    assert record.asked.left_out.samples == 4


def test_an_evaluation_of_nothing_is_refused(student_path, tmp_path):
    data = write_llava_json(tmp_path / "data", 20)
    for image in data.parent.glob("*.png"):
        image.unlink()
    for limit, count in ((None, 20), (4, 4)):
        vain = rf"no sample can be used[\s\S]*{count} of {count} were tried in vain, the first: the image"
        with pytest.raises(CachekdError, match=vain):
            evaluated([student_path], data, on_error="skip", limit=limit)
