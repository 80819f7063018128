"""Whole runs of a teacher and a student with different tokenizers."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from cachekd.cache import LogitCache
from cachekd.cache.layout import VOCABULARY_FILE
from cachekd.check.data import RunModels
from cachekd.config import DumpConfig, TrainConfig
from cachekd.data import Limits, open_samples
from cachekd.dump import dump
from cachekd.errors import CachekdError
from cachekd.losses import dbild_loss
from cachekd.models import ModelFiles, capture_vision
from cachekd.paths import BRIDGE_FILE, RUN_FILE
from cachekd.report import write_report
from cachekd.train import train
from cachekd.train.batch import collate_with_targets
from cachekd.train.estimate import estimate_training
from cachekd.train.open import make_trainer
from cachekd.train.run import say_what_is_cut
from caches import cached, copied, reseal, select_samples
from launch import train_in_two_processes
from runs import CutShort, losses
from templates import shape_processor
from tiny import tiny_processor
from tiny_texts import save_lm, write_texts
from tokenizer_pairs import run_settings, save_pair, save_student, write_data

TERMS = ("ce", "align", "vsd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = save_pair(tmp_path_factory.mktemp("runs"))
    write_data(folder / "data", 12)
    write_data(folder / "held-out", 7, start=40)
    return folder


@pytest.fixture
def settings(folder, tmp_path) -> dict:
    return run_settings(folder, tmp_path / "run", epochs=2)


def recorded(out: Path) -> dict:
    return json.loads((out / RUN_FILE).read_text())


def steps(out: Path) -> list[dict[str, float]]:
    return [entry for entry in recorded(out)["log"] if "ce" in entry]


def without_table(path: Path, out: Path) -> Path:
    """A cache as an earlier version of cachekd made it."""
    copied(path, out)
    (out / VOCABULARY_FILE).unlink()
    reseal(out / "manifest.json", lambda values: values.pop("vocabulary"))
    return out


# ---- the loss's divisors


def gradients_of_a_step(config: TrainConfig, folder: Path) -> tuple[dict, list[dict]]:
    """What the optimizer is given in the run's only step; and the log."""
    trainer, found = make_trainer(config, folder), {}
    trainer.create_optimizer()

    def keep(*_: object) -> None:
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    assert trainer.state.global_step == 1
    return found, trainer.state.log_history


def test_a_step_is_the_sum_of_each_terms_mean_however_it_is_cut(settings, folder, tmp_path):
    """Against the sums of single samples, each divided by its own answer tokens: of the student, the aligned
    ones, the teacher's. Three samples have no targets, and so are in two of the three alone."""
    keys = [key for key in LogitCache(settings["cache"]) if key not in ("s001", "s004", "s007")]
    select_samples(Path(settings["cache"]), tmp_path / "some", keys)
    changed = {"cache": str(tmp_path / "some"), "missing": "ce-only", "epochs": 1, "max_grad_norm": 0.0}
    changed |= {"lambda_align": 0.7, "lambda_vsd": 0.3, "save_steps": 0}
    config = TrainConfig(**settings | changed | {"batch_size": 12})
    trainer = make_trainer(config, tmp_path / "reference")
    sums, counts = dict.fromkeys(TERMS, 0.0), dict.fromkeys(TERMS, 0)
    for index in range(12):
        example = trainer.train_dataset[index]
        found = trainer.terms_of(trainer.model, collate_with_targets([example], 0))
        sums = {name: sums[name] + found.terms.get(name, 0.0) for name in TERMS}
        rows = 0 if example.targets is None else sum(len(ours) for _, ours in example.aligned.rows.values())
        own = len(example.encoded.token_ids), rows, len(example.for_teacher.token_ids)
        counts = {name: counts[name] + n for name, n in zip(TERMS, own, strict=True)}
    assert len(set(counts.values())) == 3
    weights = {"ce": 1.0, "align": 0.7, "vsd": 0.3}
    sum(weights[name] * sums[name] / counts[name] for name in TERMS).backward()
    expected = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    some = LogitCache(tmp_path / "some")
    logged = counts | {"vsd": sum(len(some[key]) for key in keys)}  # of each term, where it has a teacher
    for batch_size, accumulation in ((12, 1), (4, 3), (1, 12)):
        cut = {"batch_size": batch_size, "gradient_accumulation": accumulation, "logit_chunk": 7}
        gradients, log = gradients_of_a_step(config.model_copy(update=cut), tmp_path / str(batch_size))
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)
        (entry,) = (entry for entry in log if "ce" in entry)
        for name in TERMS:
            assert entry[name] == pytest.approx(sums[name].item() / logged[name], rel=1e-4), name
    of_taught = sum(
        len(trainer.train_dataset[index].encoded.token_ids) for index in range(12) if index not in (1, 4, 7)
    )
    config = config.model_copy(update={"batch_size": 1, "gradient_accumulation": 12})
    assert train(config).aligned.tokens == of_taught


@pytest.mark.slow
def test_two_processes_equal_one(settings, tmp_path):
    """2 x 3 samples a step against 6. Resumed in the middle, what was aligned is counted once."""
    settings |= {"epochs": 3, "save_steps": 3, "keep_checkpoints": True, "training": {"optim": "sgd"}}
    train(TrainConfig(**settings | {"batch_size": 6, "out": tmp_path / "one"}))
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps(settings | {"batch_size": 3, "workers": 1, "out": str(tmp_path / "two")}))
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = recorded(tmp_path / "two")
    (tmp_path / "two" / RUN_FILE).unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-6")
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = recorded(tmp_path / "two")
    assert resumed["resumed_from"] == 3
    one = recorded(tmp_path / "one")
    assert one["across_tokenizers"] == whole["across_tokenizers"] == resumed["across_tokenizers"]
    for run in (whole, resumed):
        entries = [[entry for entry in found["log"] if "ce" in entry] for found in (one, run)]
        for a, b in zip(*entries, strict=True):
            for name in (*TERMS, "loss", "grad_norm"):
                assert b[name] == pytest.approx(a[name], rel=1e-4), name


# ---- which samples


def with_nfkc(folder: Path, out: Path) -> Path:
    """A student whose tokenizer reads some characters as others."""
    copied(folder, out)
    state = json.loads((out / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "NFKC"}
    (out / "tokenizer.json").write_text(json.dumps(state))
    return out


def test_a_sample_whose_bytes_differ_is_named_and_trains_by_the_other_terms(
    settings, folder, tmp_path, caplog
):
    """In the log, the summary, the run's file and its report; L_CE and L_VSD have it all the same."""
    data = write_data(tmp_path / "data", 6)
    records = json.loads(data.read_text())
    records[2]["conversations"][1]["value"] = "ﬁve dogs"
    data.write_text(json.dumps(records))
    student = with_nfkc(folder / "chatml", tmp_path / "student")
    said = {"data": str(data), "student": str(student)}
    said["cache"] = said["eval_cache"] = str(cached(settings | said, tmp_path, tail="exact"))
    said["eval_data"] = str(data)
    with caplog.at_level(logging.WARNING):
        summary = train(TrainConfig(**settings | said))
    assert summary.eval_differing == summary.aligned.differing
    assert summary.aligned.differing.samples == 1
    (key,) = summary.aligned.differing.first
    assert key == "s002"
    assert "ﬁve dogs" in summary.aligned.differing.first[key]
    for which in ("1 samples", "1 held-out samples"):
        assert any(which in record.message and "'s002'" in record.message for record in caplog.records)
    run = recorded(summary.out)["across_tokenizers"]
    assert run["aligned"]["differing"]["first"] == summary.aligned.differing.first
    assert 0 < run["aligned"]["share"] < 1
    assert run["aligned"]["share"] == run["aligned"]["aligned"] / run["aligned"]["tokens"]
    assert recorded(summary.out)["eval_differing"] == run["aligned"]["differing"]
    assert run["vocabularies"]["shared_strings"] > 256
    assert set(summary.terms) == set(TERMS)
    assert "samples of which nothing was aligned" in write_report(summary.out, []).read_text()
    trainer = make_trainer(TrainConfig(**settings | said | {"out": tmp_path / "x"}), tmp_path / "t")
    batch = collate_with_targets([trainer.train_dataset[2]], 0)
    assert set(trainer.terms_of(trainer.model, batch).terms) == {"ce", "vsd"}


def test_a_step_in_which_nothing_is_aligned_has_no_nan(settings, folder, tmp_path):
    data = write_data(tmp_path / "data", 4)
    records = json.loads(data.read_text())
    for record in records[:2]:
        record["conversations"] = record["conversations"][:2]
        record["conversations"][1]["value"] = "ﬁve dogs"
    data.write_text(json.dumps(records))
    said = {"data": str(data), "student": str(with_nfkc(folder / "chatml", tmp_path / "student"))}
    said |= {"cache": str(cached(settings | said, tmp_path, tail="exact")), "batch_size": 2, "epochs": 1}
    train(TrainConfig(**settings | said, training={"train_sampling_strategy": "sequential"}))
    first, second = steps(settings["out"])
    assert "align" not in first
    assert first["loss"] == pytest.approx(first["ce"] + first["vsd"], rel=1e-4)
    assert second["loss"] == pytest.approx(second["ce"] + second["align"] + second["vsd"], rel=1e-4)


def test_a_sample_that_changed_since_the_dump_is_named(settings, tmp_path):
    """By the teacher's own answer tokens; and, where no teacher runs, by its content."""
    data = tmp_path / "data"
    shutil.copytree(Path(settings["data"]).parent, data)
    records = json.loads((data / "data.json").read_text())
    records[3]["conversations"][1]["value"] = "blue"
    (data / "data.json").write_text(json.dumps(records))
    settings |= {"data": str(data / "data.json")}
    with pytest.raises(CachekdError, match="answer tokens differ") as caught:
        train(TrainConfig(**settings))
    assert "s003" in str(caught.value)
    with pytest.raises(CachekdError, match="text or image differs") as caught:
        train(TrainConfig(**settings | {"lambda_vsd": 0.0, "teacher": None}))
    assert "s003" in str(caught.value)


@pytest.mark.parametrize("lambda_vsd", [0.0, 1.0])
def test_each_side_is_cut_within_its_own_limits(settings, folder, tmp_path, lambda_vsd):
    """The aligned rows are those of what is left of both."""
    lengths = ModelFiles(settings["teacher"]).encoder, ModelFiles(settings["student"]).encoder
    samples = open_samples(settings["data"])
    longest = [max(len(encoder(samples[index])) for index in range(12)) for encoder in lengths]
    cache, as_dumped = tmp_path / "cut", {"too_long": "cut", "max_tokens": longest[0] - 6, "tail": "exact"}
    dump(DumpConfig(teacher=settings["teacher"], data=settings["data"], out=cache, **as_dumped))
    said = {"too_long": "cut", "max_tokens": min(longest) - 8}
    config = TrainConfig(**settings | said | {"cache": str(cache), "lambda_vsd": lambda_vsd})
    trainer = make_trainer(config, tmp_path / "t")
    examples = [trainer.train_dataset[index] for index in range(12)]
    cut = [example for example in examples if example.encoded.cut]
    assert cut
    assert all(example.aligned.differs is None for example in examples)
    assert all(any(len(ours) for _, ours in example.aligned.rows.values()) for example in cut)
    if lambda_vsd:
        assert any(example.for_teacher.cut for example in examples)
        assert all(len(one.targets) == len(one.for_teacher.token_ids) for one in examples)
    summary = train(config)
    assert summary.aligned.differing.samples == 0


def test_the_limit_of_either_side_is_told(settings, caplog):
    """Once, where both have the same."""
    student, teacher = (ModelFiles(settings[name]) for name in ("student", "teacher"))
    ours, theirs = Limits(90, "the student's context", "cut"), Limits(80, "the teacher's context", "cut")
    for limits, times in (((ours, theirs), 2), ((ours, ours), 1), ((ours, Limits()), 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            say_what_is_cut(
                RunModels(*(m.within(each) for m, each in zip((student, teacher), limits, strict=True)))
            )
        assert len(caplog.records) == times
        for record, limit in zip(caplog.records, limits, strict=False):
            assert f"{limit.max_tokens} tokens ({limit.max_tokens_of})" in record.message


def test_ids_beyond_the_others_embedding_are_no_fault(settings, folder, tmp_path):
    """The student has ids that the teacher has no row for."""
    files = ModelFiles(folder / "vicuna")
    assert len(files.processor.tokenizer) > ModelFiles(settings["teacher"]).config.text_config.vocab_size
    trainer = make_trainer(TrainConfig(**settings), tmp_path / "t")
    limits = trainer.train_dataset.encoder.limits, trainer.train_dataset.teacher_encoder.limits
    assert [each.embedding_rows for each in limits] == [files.config.text_config.vocab_size, 320]


# ---- who has to be there


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict:
    """A pair of language models with different tokenizers, and a cache."""
    folder = tmp_path_factory.mktemp("texts")
    save_lm(folder / "teacher", seed=1, sharp=15.0)
    tokenizer = shape_processor("llama3").tokenizer
    torch.manual_seed(5)
    student = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    )
    student.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    data = write_texts(folder / "data.jsonl", 10)
    dump(DumpConfig(teacher=str(folder / "teacher"), data=str(data), out=folder / "cache"))
    return {
        "student": str(folder / "student"),
        "data": str(data),
        "cache": str(folder / "cache"),
        "lambda_vsd": 0.0,
        "lambda_align": 100.0,  # random models: L_CE has nothing to do with what this teacher says
        "batch_size": 5,
        "epochs": 10,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "align_vocabulary": "cells",
    }


def test_texts_alone_need_no_teacher(texts, tmp_path):
    """The cache says what its ids stand for; one of an earlier version asks the teacher's tokenizer: that of
    `--teacher`, or of the folder that it was made from."""
    train(TrainConfig(**texts, out=tmp_path / "run"))
    log = steps(tmp_path / "run")
    assert log[-1]["align"] < 0.7 * log[0]["align"]
    old = without_table(Path(texts["cache"]), tmp_path / "old")
    assert LogitCache(old).vocabulary is None
    train(TrainConfig(**texts | {"cache": str(old)}, out=tmp_path / "found"))
    assert [entry["align"] for entry in steps(tmp_path / "found")] == [entry["align"] for entry in log]
    reseal(old / "manifest.json", lambda values: values["teacher"].update(name="gone/teacher"))
    with pytest.raises(CachekdError, match="does not say what its token ids stand for") as caught:
        train(TrainConfig(**texts | {"cache": str(old)}, out=tmp_path / "gone"))
    assert str(caught.value.fix).startswith("--teacher")
    with pytest.raises(CachekdError, match="does not say what its token ids stand for") as caught:
        train(TrainConfig(**texts | {"cache": str(old)}, teacher=texts["student"], out=tmp_path / "other"))
    assert f"{texts['student']}: another tokenizer" in str(caught.value.found)
    teacher = str(Path(texts["cache"]).parent / "teacher")
    train(TrainConfig(**texts | {"cache": str(old)}, teacher=teacher, out=tmp_path / "named"))
    assert [entry["align"] for entry in steps(tmp_path / "named")] == [entry["align"] for entry in log]


@pytest.mark.parametrize(
    ("vocabulary", "over"), [("cells", "of tokens"), ("exact", "of strings that both have")]
)
def test_the_log_says_over_what_is_compared(texts, tmp_path, caplog, vocabulary, over):
    with caplog.at_level(logging.WARNING):
        make_trainer(
            TrainConfig(**texts | {"align_vocabulary": vocabulary}, out=tmp_path / "x"), tmp_path / "t"
        )
    said = [record.message for record in caplog.records if "different tokenizers" in record.message]
    assert len(said) == 1
    assert re.search(rf"over \d+ cells {over}, where both have read", said[0])


def test_a_cache_without_a_sketch_says_that_cells_are_not_exact(texts, tmp_path, caplog):
    folder = Path(texts["cache"]).parent
    plain = cached({"teacher": str(folder / "teacher"), "data": texts["data"]}, tmp_path, tail="none")
    with caplog.at_level(logging.WARNING):
        make_trainer(TrainConfig(**texts | {"cache": str(plain)}, out=tmp_path / "x"), tmp_path / "t")
    said = " ".join(record.message for record in caplog.records)
    assert "sums over cells are not exact" in said
    assert "teacher and student have different tokenizers" in said


def test_a_pair_that_reads_otherwise_is_refused_unless_it_is_asked_for(settings, tmp_path):
    """L_VSD alone asks for nothing."""
    settings |= {"align_vocabulary": "none"}
    with pytest.raises(CachekdError, match="different tokenizer") as caught:
        make_trainer(TrainConfig(**settings), tmp_path / "a")
    assert "--align-vocabulary cells" in str(caught.value.fix)
    with pytest.raises(CachekdError, match="different tokenizers") as caught:
        make_trainer(TrainConfig(**settings | {"cache": None, "live_teacher": True}), tmp_path / "b")
    assert "--align-vocabulary cells" in str(caught.value.fix)
    summary = train(TrainConfig(**settings | {"lambda_align": 0.0}))
    assert set(summary.terms) == {"ce", "vsd"}
    assert summary.aligned is None  # nothing was to be: a share of 0 would say that it failed
    assert recorded(summary.out)["across_tokenizers"] == {"vocabularies": None, "aligned": None}


def test_a_cache_of_another_text_than_the_teachers_is_refused(settings, folder, tmp_path):
    """The teacher that runs has to read as the cache's did."""
    other = copied(folder / "teacher", tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        if (other / name).exists():
            shutil.copy(folder / "chatml" / name, other / name)
    with pytest.raises(CachekdError, match="different tokenizer than the teacher's"):
        make_trainer(TrainConfig(**settings | {"teacher": str(other)}), tmp_path / "t")


# ---- the same run in other ways


def test_an_exact_cache_equals_the_live_teacher(settings, tmp_path):
    settings |= {"learning_rate": 2e-5}
    train(TrainConfig(**settings))
    train(TrainConfig(**settings | {"cache": None, "live_teacher": True, "out": tmp_path / "live"}))
    for ours, theirs in zip(losses(settings["out"]), losses(tmp_path / "live"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("vocabulary", ["cells", "exact"])
def test_with_one_tokenizer_nothing_changes(settings, folder, tmp_path, caplog, vocabulary):
    """Bit by bit; and the log says that the setting is idle."""
    settings |= {"student": str(folder / "same")}
    train(TrainConfig(**settings | {"align_vocabulary": "none"}))
    with caplog.at_level(logging.WARNING):
        train(TrainConfig(**settings | {"align_vocabulary": vocabulary, "out": tmp_path / "idle"}))
    assert losses(tmp_path / "idle") == losses(settings["out"])
    files = [(out / "model.safetensors").read_bytes() for out in (tmp_path / "idle", settings["out"])]
    assert files[0] == files[1]
    assert recorded(tmp_path / "idle")["across_tokenizers"] is None
    assert any("changes nothing" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "changed",
    [
        {"workers": 1},
        {"workers": 1, "training": {"dataloader_multiprocessing_context": "forkserver"}},
        {"logit_chunk": 3},
        {"gradient_checkpointing": True},
        {"log_term_gradients": True},
    ],
    ids=["workers", "forkserver", "chunks", "recomputed", "measured"],
)
def test_a_run_is_the_same(settings, tmp_path, changed):
    settings |= {"epochs": 1}
    train(TrainConfig(**settings))
    train(TrainConfig(**settings | {"out": tmp_path / "other"} | changed))
    rel = 1e-4 if "logit_chunk" in changed else 1e-6
    for ours, theirs in zip(losses(tmp_path / "other"), losses(settings["out"]), strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


def test_batches_by_tokens(settings):
    del settings["batch_size"]
    summary = train(TrainConfig(**settings, batch_tokens=300))
    assert summary.steps > 2
    assert set(summary.terms) == set(TERMS)


def test_a_run_that_is_cut_short_goes_on(settings, tmp_path):
    """To the same losses and weights, and what was aligned is counted over both sessions."""
    whole = TrainConfig(**settings, save_steps=2)
    train(whole)
    cut = whole.model_copy(update={"out": tmp_path / "cut"})
    with pytest.raises(KeyboardInterrupt):
        train(cut, [CutShort(5)])
    other = cut.model_copy(update={"align_vocabulary": "exact"})
    with pytest.raises(CachekdError, match="other settings"):
        train(other)
    summary = train(cut)
    assert summary.resumed_from == 4
    assert losses(cut.out) == losses(whole.out)
    weights = [load_file(out / "model.safetensors") for out in (cut.out, whole.out)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert recorded(cut.out)["across_tokenizers"] == recorded(whole.out)["across_tokenizers"]


def test_held_out_data_are_evaluated_by_the_same_rows(settings, folder, tmp_path):
    """Against the sums of single samples; batches are nothing to it."""
    data = str(folder / "held-out" / "data.json")
    held_out = {"data": data, "teacher": settings["teacher"]}
    settings |= {"eval_data": data, "eval_cache": str(cached(held_out, tmp_path, tail="exact"))}
    for live in (False, True):
        way = {"cache": None, "eval_cache": None, "live_teacher": True} if live else {}
        trainer = make_trainer(TrainConfig(**settings | way), tmp_path / f"t{live}")
        found = trainer.evaluate()
        sums, counts = dict.fromkeys(TERMS, 0.0), dict.fromkeys(TERMS, 0)
        with torch.no_grad():
            for index in range(7):
                batch = collate_with_targets([trainer.validation.data[index]], 0)
                one = trainer.terms_of(trainer.model.eval(), batch, evaluating=True)
                sums = {name: sums[name] + float(one.terms[name]) for name in TERMS}
                counts = {name: counts[name] + one.divisors[name] for name in TERMS}
        assert len(set(counts.values())) == 3
        for name in TERMS:
            assert found[f"eval_{name}"] == pytest.approx(sums[name] / counts[name], rel=1e-4), name
        assert found["eval_loss"] == pytest.approx(sum(found[f"eval_{name}"] for name in TERMS), rel=1e-5)


def test_a_held_out_cache_of_another_text_is_refused(settings, folder, tmp_path):
    """Of the very same weights: where no teacher runs, nobody else would notice."""
    other = copied(folder / "teacher", tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    data = str(folder / "held-out" / "data.json")
    held_out = {"data": data, "teacher": str(other)}
    settings |= {"eval_data": data, "eval_cache": str(cached(held_out, tmp_path, tail="none"))}
    settings |= {"lambda_vsd": 0.0, "teacher": None}
    with pytest.raises(CachekdError, match="was made with a different chat template"):
        make_trainer(TrainConfig(**settings), tmp_path / "t")


# ---- the switched path


@pytest.mark.parametrize("patch_size", [16, 8], ids=["other grid", "other width"])
def test_a_bridge_leads_into_the_teachers_own_text(settings, tmp_path, patch_size):
    """From width 48 to 32; and from 2 x 2 patches to 4 x 4, with which an image has other places there."""
    shape = shape_processor("chatml")
    shape.patch_size = patch_size
    student = save_student(tmp_path / "student", "chatml", vision_width=48, patch_size=patch_size)
    shape.save_pretrained(student)
    settings |= {"student": str(student), "switch_bridge": "linear"}
    trainer = make_trainer(TrainConfig(**settings), tmp_path / "t")
    assert trainer.bridge.plan.other_text == (patch_size == 16)
    batch = collate_with_targets([trainer.train_dataset[index] for index in range(3)], 0)
    found = trainer.terms_of(trainer.model, batch)
    with capture_vision(trainer.vlm) as vision:
        trainer.vlm(**batch.student.tensors)
    inputs = batch.teacher if patch_size == 16 else batch.teacher.with_pictures_of(batch.student)
    logits = trainer.teacher.logits(trainer.bridge(vision.output), inputs.tensors, inputs.positions)
    targets = batch.targets
    how = {"window": targets.window, "min_k": targets.min_k, "temperature": 3.0, "reduction": "sum"}
    torch.testing.assert_close(
        found.terms["vsd"], dbild_loss(logits[:, : targets.vocab_size], targets, **how)
    )
    train(TrainConfig(**settings))
    assert (settings["out"] / BRIDGE_FILE).exists()
    with pytest.raises(CachekdError, match="cannot be switched"):
        make_trainer(TrainConfig(**settings | {"switch_bridge": None}), tmp_path / "x")


def test_an_image_of_other_places_is_refused(settings, folder, tmp_path):
    """Where the student's image processor makes other pictures than the teacher's text has places for."""
    student = copied(folder / "chatml", tmp_path / "student")
    shape = shape_processor("chatml")
    shape.num_additional_image_tokens = 0
    shape.vision_feature_select_strategy = "full"
    shape.image_processor = tiny_processor().image_processor
    shape.num_additional_image_tokens = 2
    shape.save_pretrained(student)
    with pytest.raises(CachekdError, match="another number of places") as caught:
        make_trainer(TrainConfig(**settings | {"student": str(student)}), tmp_path / "t")
    assert "sample 's000'" in str(caught.value)


def test_an_estimate(settings):
    found = estimate_training(TrainConfig(**settings))
    assert found.teacher_parameters > 0
    assert not settings["out"].exists()
