"""What stands in a model's folder: adapters, where generation stops, a checkpoint's processor, tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.utils import is_torchvision_available
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.config import TrainConfig
from cachekd.data import SampleEncoder, open_samples
from cachekd.errors import CachekdError
from cachekd.models import load_config, load_model, load_processor, save_processor
from cachekd.models.loading import _hub_adapter
from cachekd.models.processors import TextProcessor
from cachekd.report.peek import PeekedData
from cachekd.report.token_texts import find_reader
from cachekd.train import train
from cachekd_cli.main import app
from caches import dump_cache
from hub_server import Repo
from tiny import PLAIN_TEMPLATE, checked, evaluated, save_vlm, tiny_processor, write_llava_json
from tiny_families import save
from tiny_texts import save_lm, write_texts

ADAPTER = "adapter_config.json"
CPU = torch.device("cpu")
CE_ONLY = {"lambda_vsd": 0, "lambda_align": 0}


# --- adapters ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, teacher_path) -> Path:
    """peft's, for the tiny teacher."""
    peft = pytest.importorskip("peft")
    model = load_model(str(teacher_path), dtype=torch.float32, device=CPU)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    out = tmp_path_factory.mktemp("adapters") / "adapter"
    peft.get_peft_model(model, settings).save_pretrained(out)
    return out


def test_an_adapter_beside_a_model_is_refused_and_so_is_one_alone(tmp_path, teacher_path, adapter):
    beside = shutil.copytree(teacher_path, tmp_path / "beside")
    shutil.copytree(adapter, beside, dirs_exist_ok=True)
    for path in (beside, adapter):
        for load in (load_config, load_processor, lambda p: load_model(p, dtype=torch.float32, device=CPU)):
            with pytest.raises(CachekdError, match="merge it first") as caught:
                load(str(path))
            assert "merge_and_unload" in str(caught.value)
            assert str(path) in str(caught.value)


def test_what_is_merged_is_a_model_and_a_runs_own_adapter_folder_is_not_beside_it(
    tmp_path, teacher_path, adapter
):
    """The advice works: followed, the model is the one that peft's wrapper was."""
    import peft

    base = load_model(str(teacher_path), dtype=torch.float32, device=CPU)
    wrapped = peft.PeftModel.from_pretrained(base, adapter)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_processor(str(teacher_path)).save_pretrained(tmp_path / "merged")
    shutil.copytree(adapter, tmp_path / "merged" / "adapter")
    merged = load_model(str(tmp_path / "merged"), dtype=torch.float32, device=CPU)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_a_hub_is_refused_too(hub, teacher_path, adapter):
    config, settings = (file.read_bytes() for file in (teacher_path / "config.json", adapter / ADAPTER))
    for name, files in {"whole": [config], "beside": [config, settings], "alone": [None, settings]}.items():
        repo = hub.repos[f"org/{name}"] = Repo(private=False)
        named = zip(("config.json", ADAPTER), files, strict=False)
        repo.commit({file: content for file, content in named if content is not None})
    _hub_adapter.cache_clear()
    assert load_config("org/whole").model_type == "llava"
    for name in ("org/beside", "org/alone"):
        with pytest.raises(CachekdError, match="merge it first"):
            load_config(name)
    _hub_adapter.cache_clear()


# --- where generation stops -------------------------------------------------------------------------


def other_eos(path: Path, **kwargs) -> Path:
    """A student whose tokenizer, config and generation config end a text with <pad>, and whose chat template
    ends a turn with <|end|>: as Qwen's base models have it."""
    processor = tiny_processor()
    processor.tokenizer.eos_token = "<pad>"
    return save_vlm(path, processor, **kwargs)


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> tuple[Path, Path]:
    """A student that has learnt two answers by heart, and the data; its checkpoints are kept."""
    folder = tmp_path_factory.mktemp("taught")
    data = write_llava_json(folder / "data", 2)
    config = TrainConfig(
        student=str(other_eos(folder / "student", seed=2)),
        data=str(data),
        out=folder / "run",
        batch_size=2,
        epochs=40,
        learning_rate=1e-2,
        warmup=0,
        save_steps=20,
        keep_checkpoints=True,
        **CE_ONLY,
    )
    train(config)
    return folder / "run", data


def generated(path: Path, data: Path, index: int = 0) -> str:
    """What follows the first question of a sample, as transformers' own defaults have it."""
    processor = load_processor(str(path))
    model = AutoModelForImageTextToText.from_pretrained(path)
    encoded = SampleEncoder(processor)(open_samples(data)[index])
    start = int(encoded.supervised.nonzero()[0])
    prompt = {name: value for name, value in encoded.inputs.items() if name != "input_ids"}
    ids = encoded.inputs["input_ids"][None, :start]
    made = model.generate(input_ids=ids, **prompt, do_sample=False, max_new_tokens=60)
    return processor.tokenizer.decode(made[0, start:])


def test_a_saved_student_stops_where_the_template_ends_a_turn(taught):
    run, data = taught
    end, pad = load_processor(str(run)).tokenizer.convert_tokens_to_ids(["<|end|>", "<pad>"])
    stops = GenerationConfig.from_pretrained(run).eos_token_id
    assert stops == [pad, end]  # what was there stays
    for index in range(2):
        answer = open_samples(data)[index].questions[0][1]
        assert generated(run, data, index) == f"{answer}<|end|>"


def test_without_it_the_student_goes_on(taught, tmp_path):
    """What the test above would find if generation_config.json were the student's old one."""
    run, data = taught
    old = shutil.copytree(run, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoints"))
    settings = json.loads((old / "generation_config.json").read_text())
    settings["eos_token_id"] = settings["eos_token_id"][0]
    (old / "generation_config.json").write_text(json.dumps(settings))
    assert len(generated(old, data)) > len(generated(run, data))


def test_merged_adapters_stop_there_too_and_their_checkpoints_say_merge_first(tmp_path, data_path):
    pytest.importorskip("peft")
    config = TrainConfig(
        student=str(other_eos(tmp_path / "student")),
        data=str(data_path),
        out=tmp_path / "run",
        batch_size=12,
        epochs=2,
        save_steps=1,
        keep_checkpoints=True,
        lora={"r": 2, "target_modules": ["q_proj"]},
        **CE_ONLY,
    )
    train(config)
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [0, 5]
    evaluated([tmp_path / "run"], data_path)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    with pytest.raises(CachekdError, match="merge it first"):
        evaluated([checkpoint], data_path)
    assert not (tmp_path / "run" / "adapter" / "tokenizer.json").exists()


def test_check_says_where_eos_and_end_of_turn_differ(tmp_path, teacher_path, student_path, data_path):
    def row(student: Path):
        report = checked(str(teacher_path), str(student), str(data_path))
        return next(row for row in report.rows if row.name == "end of turn")

    assert row(student_path).state == "ok"
    different = row(other_eos(tmp_path / "other"))
    assert different.state == "note"
    assert "the template's is '<|end|>', the tokenizer's EOS '<pad>'" in different.found
    assert "generation stops at '<|end|>'" not in different.found
    no_end = PLAIN_TEMPLATE.replace("<|end|>", "")
    assert "writes none" in row(save_vlm(tmp_path / "none", tiny_processor(template=no_end))).found


def test_a_language_model_and_a_list_of_stops(tmp_path):
    """One token is not added twice, and a missing one is added to whatever was there."""
    student = save_lm(tmp_path / "student", seed=1)
    encoder = SampleEncoder(load_processor(str(student)))
    file = student / "generation_config.json"
    for there, expected in ((None, encoder.end_of_turn), ([3, 4], [3, 4, encoder.end_of_turn])):
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | {"eos_token_id": there, "temperature": 0.5}))
        for _ in range(2):
            save_processor(encoder, student)
            found = json.loads(file.read_text())
            assert (found["eos_token_id"], found["temperature"]) == (expected, 0.5)


# --- checkpoints ------------------------------------------------------------------------------------


def test_a_checkpoint_is_evaluated_like_any_model(taught):
    run, data = taught
    checkpoint, last = (run / "checkpoints" / f"checkpoint-{step}" for step in (20, 40))
    result = CliRunner().invoke(app, ["eval", str(checkpoint), "--data", str(data), "--json"])
    assert result.exit_code == 0, result.output
    final, same = evaluated([run, last], data).models
    assert final.exact_match == same.exact_match > 0
    assert generated(last, data) == generated(run, data)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_checkpoints_of_processors_without_their_video_part(tmp_path, family):
    data = write_llava_json(tmp_path / "data", 4)
    settings = {"batch_size": 4, "epochs": 2, "save_steps": 1, "keep_checkpoints": True, **CE_ONLY}
    train(
        TrainConfig(student=str(save(tmp_path / "s", family)), data=str(data), out=tmp_path / "r", **settings)
    )
    scores = evaluated([tmp_path / "r" / "checkpoints" / "checkpoint-2", tmp_path / "r"], data)
    assert scores.models[0].exact_match == scores.models[1].exact_match


def test_a_language_models_checkpoint_has_its_tokenizer(tmp_path):
    data = write_texts(tmp_path / "data.jsonl", 4)
    student = save_lm(tmp_path / "student", seed=1)
    settings = {"batch_size": 4, "epochs": 1, "save_steps": 1, "keep_checkpoints": True, **CE_ONLY}
    train(TrainConfig(student=str(student), data=str(data), out=tmp_path / "run", **settings))
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    assert evaluated([checkpoint], data).asked.questions > 0
    assert AutoTokenizer.from_pretrained(checkpoint).get_vocab()
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.vocab_size == 360


# --- peek's tokenizer -------------------------------------------------------------------------------


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision transformers' own loader does")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_peek_separates_turns_without_the_video_part(tmp_path, family):
    data = write_llava_json(tmp_path / "data", 6)
    cache = LogitCache(dump_cache(tmp_path / "cache", save(tmp_path / "teacher", family), data))
    reader = find_reader(cache, None)
    opened = PeekedData(cache, open_samples(data), reader.processor)
    sample = opened[next(iter(cache))]
    assert len(sample.questions) == 2
    turns = opened.turns(sample)
    assert turns is not None
    assert set(turns) == {0, 1}
    assert len(turns) == len(cache[sample.key])


def test_peek_reads_a_language_model_and_a_folder_with_a_tokenizer_alone(tmp_path):
    teacher = save_lm(tmp_path / "teacher", seed=1)
    cache = LogitCache(dump_cache(tmp_path / "cache", teacher, write_texts(tmp_path / "d.jsonl", 6)))
    assert isinstance(find_reader(cache, None).processor, TextProcessor)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "alone")
    reader = find_reader(cache, str(tmp_path / "alone"))
    assert reader.processor is None
    assert reader.texts[int(cache[next(iter(cache))].token_ids[-1])] == "<|im_end|>"


@pytest.mark.parametrize("name", ["loading.AutoConfig", "processors.AutoProcessor"])
def test_an_error_without_a_text_is_called_by_its_name(teacher_path, monkeypatch, name):
    """Taking the first line of nothing was a traceback."""

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError

    monkeypatch.setattr(f"cachekd.models.{name}.from_pretrained", fail)
    with pytest.raises(CachekdError, match="can be loaded") as caught:
        load_processor(str(teacher_path))
    assert caught.value.found == "OSError()"
