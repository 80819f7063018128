"""Language models without images: plain offline DBiLD, from a folder or from a GGUF file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from templates import shape_processor
from tiny import conversation, noise_image
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.config import DumpConfig, TrainConfig
from cachekd.dump import dump, estimate_dump
from cachekd.errors import BadSample, CachekdError
from cachekd.evaluate import evaluate
from cachekd.files import RUN_FILE
from cachekd.losses import cross_entropy_loss, dbild_loss
from cachekd.report import write_report
from cachekd.samples import SampleEncoder, collate, open_samples, predicting_positions, sample_from_llava
from cachekd.targets import DenseTargets
from cachekd.train import collate_with_targets, make_trainer, train
from cachekd.vlm import load_model, load_processor, logits_at
from cachekd_cli.main import app

CPU = torch.device("cpu")


def save_lm(path: Path, *, seed: int, width: int = 32, rows: int = 360, sharp: float = 1.0) -> Path:
    """A Llama with random weights and a tokenizer without a pad token."""
    tokenizer = shape_processor("qwen3").tokenizer
    tokenizer.pad_token = None
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_texts(path: Path, count: int) -> Path:
    records = []
    for index in range(count):
        turns = conversation(index, 1 + index % 3)
        messages = [
            {
                "role": "user" if turn["from"] == "human" else "assistant",
                "content": turn["value"].replace("<image>\n", ""),
            }
            for turn in turns
        ]
        records.append(json.dumps({"id": f"t{index:02d}", "messages": messages}))
    path.write_text("\n".join(records))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    """A run against a dumped cache; the student's embedding has other padding rows than the teacher's."""
    folder = tmp_path_factory.mktemp("text")
    teacher = save_lm(folder / "teacher", seed=1, width=48, sharp=15.0)
    student = save_lm(folder / "student", seed=2, rows=352)
    data = write_texts(folder / "data.jsonl", 10)
    summary = dump(DumpConfig(teacher=str(teacher), data=str(data), out=folder / "cache", batch_size=4))
    assert summary.finished
    assert summary.samples == 10
    return TrainConfig(
        student=str(student),
        data=str(data),
        cache=folder / "cache",
        out=folder / "run",
        lambda_vsd=0,
        lambda_align=5,
        batch_size=5,
        epochs=8,
        learning_rate=5e-3,
        logging_steps=1,
    )


def test_the_loss_is_ce_and_dbild_of_live_logits(config, tmp_path):
    folder = config.out.parent
    out = tmp_path / "exact"
    dump(DumpConfig(teacher=str(folder / "teacher"), data=str(config.data), out=out, tail="exact"))
    trainer = make_trainer(config.model_copy(update={"cache": out}), tmp_path)
    batch = collate_with_targets([trainer.train_dataset[i] for i in range(4)], 0)
    loss = trainer.compute_loss(trainer.model, dict(batch))

    encoder, samples = SampleEncoder(load_processor(config.student)), open_samples(config.data)
    inputs = collate([encoder(samples[i]) for i in range(4)], encoder.pad_token_id)
    supervised = inputs.pop("supervised")
    answers = inputs["input_ids"][supervised]
    logits = {}
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        with torch.no_grad():
            logits[name] = model(**inputs).logits[predicting_positions(supervised)]
    vocab = batch["targets"].vocab_size
    assert vocab == len(load_processor(config.student).tokenizer) < 352
    live = DenseTargets(logits["teacher"][:, :vocab], answers)
    align = dbild_loss(logits["student"][:, :vocab], live, temperature=3.0, window=batch["targets"].window)
    expected = cross_entropy_loss(logits["student"], answers) + 5 * align
    torch.testing.assert_close(loss.detach(), expected, rtol=5e-3, atol=1e-4)


def test_dump_train_eval_report_and_reload(config):
    summary = train(config)
    log = json.loads((config.out / RUN_FILE).read_text())["log"]
    assert summary.steps == 16
    assert "vsd" not in summary.terms
    assert summary.terms["align"] < 0.8 * log[0]["align"]
    plain = AutoModelForCausalLM.from_pretrained(config.out)
    ours = load_model(str(config.out), dtype=torch.float32, device=CPU)
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    ids = tokenizer("what is the color?", return_tensors="pt")
    positions = torch.ones_like(ids["input_ids"], dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(plain(**ids).logits[0], logits_at(ours, ids, positions))
    assert tokenizer.chat_template == load_processor(config.student).chat_template
    assert tokenizer.pad_token is None  # as it was given

    folder = config.out.parent
    result = evaluate([str(config.out), config.student], config.data, teacher=str(folder / "teacher"))
    trained, start = result.models
    assert result.questions == sum(1 + index % 3 for index in range(10))
    assert trained.kl < start.kl
    page = write_report(config.out, evaluation=result)
    assert "align" in page.read_text()


def test_estimate_says_what_a_dump_costs(config):
    teacher = str(config.out.parent / "teacher")
    found = estimate_dump(DumpConfig(teacher=teacher, data=str(config.data), out=config.out.parent / "none"))
    assert found.size > 0
    assert not (config.out.parent / "none").exists()


def test_the_manifest_says_that_there_are_no_images(config):
    manifest = LogitCache(config.cache).manifest
    assert manifest.teacher.model_type == "llama"
    assert manifest.fingerprints.image_token == ""


def test_the_switched_path_and_images_are_refused(config, tmp_path):
    arguments = ["train", "--student", config.student, "--teacher", str(config.out.parent / "teacher")]
    arguments += ["--data", str(config.data), "--cache", str(config.cache), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, CachekdError)
    assert "no vision encoder" in str(result.exception)
    assert "--lambda-vsd 0" in str(result.exception)
    sample = sample_from_llava("k", conversation(0), (noise_image(0),), origin="test")
    with pytest.raises(BadSample, match="takes no images"):
        SampleEncoder(load_processor(config.student))(sample)


def test_a_gguf_file_that_is_none_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF or not")
    with pytest.raises(CachekdError, match="no model can be loaded") as caught:
        dump(DumpConfig(teacher=str(tmp_path / "x.gguf"), data="none.jsonl", out=tmp_path / "out"))
    assert str(tmp_path / "x.gguf") in str(caught.value)
