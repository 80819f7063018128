"""The switch bridge of families that cut pictures into tiles: SmolVLM 2.2B teaches 256M, at a tiny size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    Idefics3Config,
    Idefics3ImageProcessorPil,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from typer.testing import CliRunner

from cachekd.check.data import RunModels
from cachekd.check.tiles import require_same_tiles, tiles_of
from cachekd.config import DumpConfig, TrainConfig
from cachekd.data import Sample, collate, predicting_positions
from cachekd.dump import dump
from cachekd.errors import BadSample, CachekdError
from cachekd.losses import dbild_loss
from cachekd.models import (
    ModelFiles,
    SwitchBridge,
    SwitchedTeacher,
    capture_vision,
    empty_model,
    encode,
    plan_bridge,
)
from cachekd.models.bridge import BridgePlan
from cachekd.models.compat import switch_differences
from cachekd.paths import BRIDGE_FILE, RUN_FILE
from cachekd.train import train
from cachekd.train.batch import collate_with_targets
from cachekd.train.estimate import estimate_training
from cachekd.train.open import make_trainer
from cachekd_cli.main import app
from family_samples import encoder_of, sample
from runs import CutShort, losses
from tiny import checked, noise_image
from tiny_families import Tiles, build, save_tiles

CPU = torch.device("cpu")
# As of 384 pixels in patches of 14, shuffled three by three, and of 512 in patches of 16, four by four.
TEACHERS, STUDENTS = Tiles(36, 4, 3), Tiles(32, 4, 2)
SQUARE, WIDE, TALL = (40, 40), (40, 20), (20, 40)
ODD = (200, 103)  # of which the teacher makes two rows, and the student one


def write_data(folder: Path, sizes: list[tuple[tuple[int, int], ...]]) -> Path:
    """A LLaVA file; a sample has a picture of each of its sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index, some in enumerate(sizes):
        names = [f"{index}-{number}.png" for number in range(len(some))]
        for number, (name, size) in enumerate(zip(names, some, strict=True)):
            noise_image(10 * index + number, size).save(folder / name)
        said = [
            {"from": "human", "value": "<image>" * len(some) + "is there a dog?"},
            {"from": "gpt", "value": ("a large green dog.", "no", "red")[index % 3]},
        ]
        records.append({"id": f"s{index:03d}", "image": names, "conversations": said})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict:
    """A run's settings: 9 x 9 patches of width 24 for the teacher, a SmolVLM; 8 x 8 of width 16 for the
    student, an Idefics3; and a cache."""
    folder = tmp_path_factory.mktemp("tiles")
    teacher = save_tiles(folder / "teacher", "smolvlm", TEACHERS, width=24, text_width=32, seed=1)
    student = save_tiles(folder / "student", "idefics3", STUDENTS, width=16, text_width=16, seed=2)
    data = write_data(
        folder / "data", [(SQUARE,), (WIDE,), (TALL, SQUARE), (), (SQUARE, WIDE), (TALL,), (WIDE,), (SQUARE,)]
    )
    dump(DumpConfig(teacher=str(teacher), data=str(data), out=folder / "cache", batch_size=4))
    return {
        "teacher": str(teacher),
        "student": str(student),
        "data": str(data),
        "cache": folder / "cache",
        "switch_bridge": "linear",
        "batch_size": 4,
        "epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }


@pytest.fixture(scope="module")
def models(pair) -> RunModels:
    return RunModels(ModelFiles(pair["student"]), ModelFiles(pair["teacher"]))


# ---- the bridge


def resampled_by_pillow(tile: torch.Tensor, side: int, other: int) -> torch.Tensor:
    """[side * side, D] as [other * other, D], one channel after the other."""
    channels = [
        np.asarray(
            Image.fromarray(tile[:, channel].reshape(side, side).numpy()).resize(
                (other, other), Image.Resampling.BILINEAR
            )
        )
        for channel in range(tile.shape[1])
    ]
    return torch.from_numpy(np.stack(channels, -1)).reshape(other * other, -1)


def test_the_switched_path_is_the_teachers_text_with_each_tile_in_its_place(models):
    """Sample by sample, tile by tile, through the teacher's connector and language model by hand."""
    samples = [
        sample("one", "<image>what is it?", "a large green dog.", sizes=(WIDE,)),
        sample("two", "<image>and <image>?", "red", sizes=(TALL, SQUARE), seed=7),
        sample("text", "is there a dog?", "yes no"),
    ]
    plan = models.bridge_plan()
    assert plan == BridgePlan((16, 24), grid=(8, 9), other_text=True, tiles=True)
    bridge = SwitchBridge(plan)
    student = models.student.load(dtype=torch.float32, device=CPU)
    teacher = SwitchedTeacher(models.teacher.load(dtype=torch.float32, device=CPU, tower=False))
    ours, theirs = ([side.encoder(one) for one in samples] for side in models)
    batch = {name: x for name, x in collate(ours, 0).items() if name != "supervised"}
    vision = encode(student, batch)
    assert vision.last_hidden_state.shape == (3 + 3 + 5, 64, 16)
    batch = collate(theirs, 0)
    positions = predicting_positions(batch.pop("supervised"))
    with torch.no_grad():
        found = teacher.logits(bridge(vision), batch, positions)
        expected, tile = [], 0
        for own, read in zip(ours, theirs, strict=True):
            ids = read.inputs["input_ids"]
            embedded = teacher.model.get_input_embeddings()(ids)
            places = (ids == teacher.model.config.image_token_id).nonzero()[:, 0]
            pictures = [
                picture
                for picture in own.inputs.get("pixel_values", torch.zeros(1, 0, 1))[0]
                if picture.any()
            ]
            assert len(places) == 9 * len(pictures)
            for picture, where in zip(pictures, places.view(-1, 9), strict=True):
                patches = encode(student, {"pixel_values": picture[None, None]}).last_hidden_state[0]
                torch.testing.assert_close(patches, vision.last_hidden_state[tile])
                patches = resampled_by_pillow(patches, 8, 9) @ bridge.linear.weight.T + bridge.linear.bias
                embedded[where] = teacher.model.model.connector(patches[None])[0]
                tile += 1
            logits = teacher.model(inputs_embeds=embedded[None], use_cache=False).logits[0]
            expected.append(logits[predicting_positions(read.supervised[None])[0]])
    assert tile == len(vision.last_hidden_state)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def vsd_by_hand(trainer, batch) -> torch.Tensor:
    """L_VSD summed over a batch, of what V_S makes through the bridge, P_T and L_T."""
    with capture_vision(trainer.vlm) as vision:
        trainer.vlm(**batch.student.tensors)
    inputs, targets = batch.teacher, batch.targets
    logits = trainer.teacher.logits(trainer.bridge(vision.output), inputs.tensors, inputs.positions)
    how = {"window": targets.window, "min_k": targets.min_k, "temperature": 3.0, "reduction": "sum"}
    return dbild_loss(logits[:, : targets.vocab_size], targets, **how)


def test_l_vsd_reaches_the_vision_encoder_and_the_bridge(pair, tmp_path):
    trainer = make_trainer(TrainConfig(**pair, out=tmp_path / "x"), tmp_path / "t")
    batch = collate_with_targets([trainer.train_dataset[i] for i in range(5)], 0)
    vsd = trainer.terms_of(trainer.model, batch).terms["vsd"]
    torch.testing.assert_close(vsd, vsd_by_hand(trainer, batch))
    vsd.backward()
    touched = {name for name, p in trainer.vlm.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert all(name.startswith("model.vision_model.") for name in touched)
    assert all(p.grad.any() for p in trainer.bridge.parameters())
    assert all(p.grad is None for p in trainer.teacher.model.parameters())


def test_an_idefics3_is_switched_into_a_smolvlm_as_a_smolvlm_is():
    """Their configurations have other names, and their code is one: without a bridge, where shapes agree."""
    teacher, same, other = (
        build(name, seed=seed) for name, seed in (("smolvlm", 1), ("smolvlm", 2), ("idefics3", 3))
    )
    other.load_state_dict(same.state_dict())
    assert not switch_differences(teacher.config, other.config)
    encoder = encoder_of("smolvlm")
    batch = collate([encoder(sample("s", "<image>and <image>?", "red", sizes=(TALL, SQUARE)))], 0)
    positions = predicting_positions(batch.pop("supervised"))
    switched = SwitchedTeacher(teacher)
    with torch.no_grad():
        expected, found = (switched.logits(encode(one, batch), batch, positions) for one in (same, other))
    torch.testing.assert_close(found, expected)


# ---- tiles that are not the same


def test_a_sample_of_other_tiles_is_refused(models):
    student, teacher = (side.encoder for side in models)

    def tiles(one: Sample) -> list[int]:
        require_same_tiles(student(one), teacher(one), student, teacher)
        return len(tiles_of(student(one), student))

    assert tiles(sample("square", "<image>?", "no", sizes=(SQUARE,))) == 5
    assert tiles(sample("two", "<image><image>?", "no", sizes=(WIDE, TALL))) == 6
    assert tiles(sample("text", "and?", "no")) == 0
    with pytest.raises(BadSample, match="other tiles for the teacher") as caught:
        tiles(sample("odd", "<image>?", "no", sizes=(ODD,)))
    assert "'odd'" in caught.value.where
    assert caught.value.expected.startswith("5 tiles (<row_1_col_1> <row_1_col_2> <row_2_col_1>")
    assert caught.value.found == "3 tiles (<row_1_col_1> <row_1_col_2> <global-img>)"


def test_as_many_tiles_in_another_order_are_refused(models):
    """Two pictures whose tiles are as many together, and not the same."""
    student, teacher = (side.encoder for side in models)
    ours = student(sample("s", "<image><image>?", "no", sizes=(WIDE, TALL)))
    theirs = teacher(sample("s", "<image><image>?", "no", sizes=(TALL, WIDE)))
    assert ours.inputs["pixel_values"].shape[1] == theirs.inputs["pixel_values"].shape[1]
    with pytest.raises(BadSample, match="other tiles"):
        require_same_tiles(ours, theirs, student, teacher)


def test_a_run_stops_at_such_a_sample_or_leaves_it_out_by_name(pair, tmp_path):
    data = write_data(tmp_path / "data", [(SQUARE,), (ODD,), (WIDE,), (TALL,)])
    dump(DumpConfig(teacher=pair["teacher"], data=str(data), out=tmp_path / "cache", batch_size=4))
    settings = pair | {"data": str(data), "cache": tmp_path / "cache", "batch_size": 2, "epochs": 1}
    with pytest.raises(CachekdError, match="other tiles for the teacher") as caught:
        train(TrainConfig(**settings, out=tmp_path / "stops"))
    assert "sample 's001'" in caught.value.where
    assert "--on-error skip" in caught.value.fix
    done = train(TrainConfig(**settings, out=tmp_path / "skips", on_error="skip"))
    assert done.steps == 2
    assert done.bad.samples == 1
    assert "other tiles for the teacher" in done.bad.first["s001"]
    held_out = {"eval_data": str(data), "eval_cache": tmp_path / "cache"}
    with pytest.raises(CachekdError, match="other tiles for the teacher"):
        make_trainer(TrainConfig(**pair | held_out, out=tmp_path / "held"), tmp_path / "t")


def test_the_check_says_it(pair, tmp_path):
    models = [pair["teacher"], pair["student"]]
    plain = checked(*models, pair["data"])
    refused = [row for row in plain.rows if row.state == "refused"]
    assert {row.name.removeprefix("switch: ") for row in refused} == {
        "vision width (vision_config.hidden_size)",
        "image tokens (vision_config.image_size)",
        "scale_factor",
    }  # and not the family
    assert all(row.fix.startswith("--switch-bridge linear (beyond the paper)") for row in refused)
    command = ["check", "--teacher", models[0], "--student", models[1], "--switch-bridge", "linear"]
    done = CliRunner().invoke(app, [*command, "--data", pair["data"], "--json"])
    assert done.exit_code == 0, done.output
    found = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert "width 16 to 24, 8 x 8 patches to 9 x 9 in each tile" in found["switch bridge"]["found"]
    assert found["tiles"]["found"] == "5, 3 a sample, the same on both sides"
    assert json.loads(done.stdout)["step"]["kept"]["switched"] > 0
    odd = write_data(tmp_path, [(SQUARE,), (ODD,)])
    for on_error, state in (("stop", "refused"), ("skip", "note")):
        rows = {
            row.name: row for row in checked(*models, odd, switch_bridge="linear", on_error=on_error).rows
        }
        assert rows["tiles"].state == state
        assert "other tiles for the teacher" in rows["tiles"].text


# ---- runs


def test_a_run_is_resumed_and_estimated(pair, tmp_path):
    whole = TrainConfig(**pair, out=tmp_path / "whole", save_steps=1)
    estimate = estimate_training(whole)
    assert estimate.bridge_parameters == 16 * 24 + 24
    assert not whole.out.exists()
    train(whole)
    entries = losses(whole.out)
    assert len(entries) == 4
    assert np.isfinite(entries).all()
    run = json.loads((whole.out / RUN_FILE).read_text())
    assert run["switch_bridge"]["tiles"] is True
    config = TrainConfig(**pair, out=tmp_path / "cut", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(3)])
    assert train(config).resumed_from == 3
    assert losses(config.out) == entries
    for name in (BRIDGE_FILE, "model.safetensors"):
        again, weights = load_file(config.out / name), load_file(whole.out / name)
        assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_across_tokenizers_of_which_one_has_no_tokens_for_rows(pair, tmp_path):
    """As in the first SmolVLM, whose tokenizer has several tokens for the name of a tile."""
    student = save_tiles(tmp_path / "student", "idefics3", STUDENTS, width=16, text_width=16, seed=2, rows=[])
    settings = pair | {"student": str(student), "align_vocabulary": "cells"}
    trainer = make_trainer(TrainConfig(**settings, out=tmp_path / "x"), tmp_path / "t")
    examples = [trainer.train_dataset[index] for index in range(5)]
    names = [tiles_of(one.encoded, trainer.train_dataset.encoder) for one in examples]
    assert [len(some) for some in names] == [5, 3, 8, 0, 8]
    assert re.fullmatch(r"<row_1_col_1>", names[0][0])
    batch = collate_with_targets(examples, 0)
    found = trainer.terms_of(trainer.model, batch).terms["vsd"]
    torch.testing.assert_close(found, vsd_by_hand(trainer, batch))
    train(TrainConfig(**settings, out=tmp_path / "run"))


# ---- at published sizes


def published(config_class: type, tower: dict, scale: int, width: int, vocabulary: int = 49280):
    """SmolVLM's configurations as published, in what the switched path depends on."""
    return config_class(
        vision_config=tower,
        text_config={
            "model_type": "llama",
            "hidden_size": width,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 2,
            "vocab_size": vocabulary,
        },
        scale_factor=scale,
        image_token_id=49190,
    )


LARGE = {"hidden_size": 1152, "image_size": 384, "patch_size": 14, "num_hidden_layers": 2}
LARGE |= {"num_attention_heads": 16, "intermediate_size": 4304}
SMALL = {"hidden_size": 768, "image_size": 512, "patch_size": 16, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 12, "intermediate_size": 3072}


@pytest.mark.parametrize("config_class", [SmolVLMConfig, Idefics3Config])
@pytest.mark.parametrize("width", [576, 960], ids=["256M", "500M"])
def test_smolvlm_at_its_published_sizes(config_class, width):
    """No weights: 17 tiles on "meta"."""
    teacher = published(SmolVLMConfig, LARGE, 3, 2048)
    student = published(config_class, SMALL, 4, width)
    plan = plan_bridge(teacher, student)
    assert plan == BridgePlan((768, 1152), grid=(32, 27), other_text=True, tiles=True)
    assert str(plan) == "width 768 to 1,152, 32 x 32 patches to 27 x 27 in each tile"
    ours, theirs = empty_model(student), empty_model(teacher)
    assert ours.model.vision_model.embeddings.num_patches == 32 * 32
    assert theirs.model.vision_model.embeddings.num_patches == 27 * 27
    with torch.device("meta"):
        bridge, patches = SwitchBridge(plan), torch.empty(17, 32 * 32, 768)
    assert ours.model.connector(patches).shape == (17, 64, width)
    bridged = bridge(BaseModelOutputWithPooling(last_hidden_state=patches)).last_hidden_state
    assert theirs.model.connector(bridged).shape == (17, 81, 2048)
    assert sum(p.numel() for p in bridge.parameters()) == 768 * 1152 + 1152


@pytest.mark.parametrize(
    ("size", "rows"),
    [((640, 480), (3, 4)), ((480, 640), (4, 3)), ((512, 512), (4, 4)), ((300, 1200), (4, 1))],
)
def test_both_cut_a_picture_alike_at_the_published_sizes(size, rows):
    picture = noise_image(0, size)
    shapes = []
    for image_class in (SmolVLMImageProcessorPil, Idefics3ImageProcessorPil):
        for pixels in (384, 512):
            images = image_class(size={"longest_edge": 4 * pixels}, max_image_size={"longest_edge": pixels})
            found = images([[picture]], return_row_col_info=True)
            assert np.asarray(found["pixel_attention_mask"]).all()  # a tile has no padding
            shapes.append((found["rows"][0][0], found["cols"][0][0], np.shape(found["pixel_values"])[1]))
    assert set(shapes) == {(*rows, rows[0] * rows[1] + 1)}
