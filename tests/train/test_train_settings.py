"""What `cachekd train` is told wrongly: refused before anything is loaded, and said so."""

from __future__ import annotations

import pickle
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.train import SwitchKDTrainingArguments
from cachekd.train.arguments import explained
from cachekd.train.open import make_trainer

arguments_of = SwitchKDTrainingArguments.of


def config(training: dict, **changed) -> TrainConfig:
    plain = {"student": "s", "data": "d", "out": Path("o"), "lambda_align": 0, "lambda_vsd": 0}
    return TrainConfig(**plain | changed, training=training)


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"hub_token": "hf_SECRET"}, "HF_TOKEN in the environment, or `hf auth login`"),
        ({"optim": "adamw_8bit"}, "pip install -U bitsandbytes"),
        ({"optim": "lomo"}, "pip install lomo-optim"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "need to install `galore_torch`"),
        ({"optim": "grokadamw"}, "pip install grokadamw"),
        ({"report_to": ["wandb"]}, "pip install wandb"),
        ({"report_to": "trackio"}, "pip install trackio"),
        ({"report_to": ["tensorboard", "neptune"]}, "pip install neptune"),
        ({"report_to": ["nosuch"]}, "tensorboard, trackio, wandb"),
        ({"max_steps": "three"}, "valid integer"),
        ({"max_steps": 0}, "at least 1"),
        ({"logging_dir": "x"}, "TENSORBOARD_LOGGING_DIR"),
        ({"adam_beta2": "much"}, "valid number"),
        ({"save_strategy": "best"}, "load_best_model_at_end: true keeps the best one"),
        ({"do_predict": True}, "`cachekd eval` scores a run"),
        ({"dataloader_multiprocessing_context": "bogus"}, "spawn"),
        ({"dataloader_multiprocessing_context": 5}, "spawn"),
        ({"train_sampling_strategy": "by_length"}, "one of random, sequential, group_by_length"),
        ({"train_sampling_strategy": "batch_rebalance"}, "one of random, sequential, group_by_length"),
        ({"accelerator_config": {"dispatch_batches": True}}, "every process reads its own samples"),
        ({"accelerator_config": '{"dispatch_batches": true}'}, "every process reads its own samples"),
        ({"accelerator_config": "no_such.json"}, "no_such.json"),
        ({"accelerator_config": {"bogus": True}}, "bogus"),
        ({"debug": "underflow_overflow"}, "looks at logits"),
        ({"debug": 3}, "not iterable"),
        ({"logging_steps": 3}, "set `logging_steps` at the top level, outside `training`"),
        ({"group_by_length": True}, "training: {train_sampling_strategy: group_by_length}"),
        ({"adam_beta3": 1}, "did you mean 'adam_beta"),
    ],
)
def test_a_setting_that_would_fail_late_is_refused_at_once(tmp_path, training, says):
    package = says.split()[-1].strip("`").replace("-", "_")
    if "install" in says and find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(CachekdError) as caught:
        arguments_of(config(training, workers=int("context" in str(training))), tmp_path)
    assert says in str(caught.value)
    assert "training" in str(caught.value.where)
    assert "hf_SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataloader_multiprocessing_context", "spawn"),
        ("dataloader_persistent_workers", True),
        ("dataloader_prefetch_factor", 2),
    ],
)
def test_settings_of_workers_without_any_are_refused_before_anything_is_read(tmp_path, name, value):
    """Neither the student nor the data are there."""
    with pytest.raises(CachekdError) as caught:
        make_trainer(config({name: value}, workers=0), tmp_path)
    assert caught.value.where == f"setting 'training.{name}'"
    assert "--workers 1" in str(caught.value.expected)
    assert getattr(arguments_of(config({name: value}, workers=1), tmp_path), name) == value


def test_numbers_as_yaml_reads_them(tmp_path):
    """To YAML 1e-7 without a point is a text."""
    arguments = arguments_of(config({"adam_epsilon": "1e-7", "max_steps": 3}), tmp_path)
    assert arguments.adam_epsilon == 1e-7
    assert arguments.max_steps == 3


def test_built_without_a_config_they_check_themselves(tmp_path):
    assert SwitchKDTrainingArguments(str(tmp_path), use_cpu=True).lr_scheduler_type == "cosine"
    for settings in ({"label_smoothing_factor": 0.1}, {"include_for_metrics": ["x"]}, {"max_steps": 0}):
        (name,) = settings
        with pytest.raises(CachekdError, match=name):
            SwitchKDTrainingArguments(str(tmp_path), use_cpu=True, **settings)


def test_what_a_setting_is_anyway_may_be_said(tmp_path):
    said = {"remove_unused_columns": False, "do_predict": False, "dataloader_persistent_workers": False}
    arguments_of(config(said, workers=0), tmp_path)


def test_other_settings_of_accelerate_leave_ours(tmp_path):
    arguments = arguments_of(config({"accelerator_config": {"even_batches": False}}), tmp_path)
    assert arguments.accelerator_config.even_batches is False
    assert arguments.accelerator_config.non_blocking is not None


def test_what_the_trainer_refuses_late_names_the_setting(tmp_path, student_path, data_path):
    there = config({"neftune_noise_alpha": 1, "optim": "galore_adamw"}, student=str(student_path))
    with pytest.raises(CachekdError, match="the Trainer refuses") as caught, explained(there.training):
        raise ValueError("You need to define `optim_target_modules` to use 1 of galore_adamw")
    assert caught.value.where == "setting 'training.optim'"
    with pytest.raises(ValueError, match="plain"), explained({}):
        raise ValueError("plain")
    late = config({"optim": "adamw_torch_npu_fused"}, student=str(student_path), data=str(data_path))
    with pytest.raises(CachekdError, match="the Trainer refuses") as caught:
        make_trainer(late, tmp_path)
    assert "training.optim" in str(caught.value)
    assert "torch_npu" in str(caught.value)


def test_a_model_without_weights_or_with_half_of_them(tmp_path, student_path, data_path):
    half, none = tmp_path / "half", tmp_path / "none"
    for folder in (half, none):
        shutil.copytree(student_path, folder)
    (none / "model.safetensors").unlink()
    weights = half / "model.safetensors"
    for size in (1000, weights.stat().st_size // 2):
        weights.write_bytes((Path(student_path) / "model.safetensors").read_bytes()[:size])
        with pytest.raises(CachekdError, match="weights cannot be read") as caught:
            make_trainer(config({}, student=str(half), data=str(data_path)), tmp_path / "t")
        assert str(half) in str(caught.value)
    with pytest.raises(CachekdError, match="folder has no weights") as caught:
        make_trainer(config({}, student=str(none), data=str(data_path)), tmp_path / "t")
    assert str(none) in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_beside_a_model_they_are_the_trainers_own(tmp_path, protocol):
    """training_args.bin does not depend on where our class stands."""
    ours = arguments_of(config({"max_steps": 3}), tmp_path)
    pickled = pickle.dumps(ours, protocol)
    assert b"cachekd" not in pickled.replace(str(tmp_path).encode(), b"")
    theirs = pickle.loads(pickled)
    assert type(theirs) is TrainingArguments
    own = {name: getattr(ours, name) for name in ("batch_tokens", "teacher_apart")}
    assert theirs.to_dict() | own == ours.to_dict()


def test_fsdp_as_the_documentation_has_it(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "several-gpus.md").read_text()
    [block] = re.findall(r"```yaml\n(training:\n  fsdp:.*?)```", text, re.DOTALL)
    said = yaml.safe_load(block)["training"]
    assert said["fsdp"] is True  # 5.23 warns of the lists and texts that came before
    arguments = arguments_of(config(said), tmp_path)
    wrapped = arguments.fsdp_plugin_args["transformer_cls_names_to_wrap"].split(",")
    assert wrapped == said["fsdp_config"]["transformer_layer_cls_to_wrap"]
