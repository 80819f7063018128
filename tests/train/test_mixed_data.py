"""Images and text alone in one data set, as in LLaVA's mixes: dumped, trained in every stage, measured."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from cachekd.cache import LogitCache
from cachekd.config import DumpConfig, TrainConfig
from cachekd.data import SampleEncoder, open_samples, rough_lengths
from cachekd.dump import dump
from cachekd.errors import BadSample
from cachekd.train import train
from launch import train_in_two_processes
from tiny import conversation, noise_image, png_bytes, tiny_processor, write_tar

KEYS = [f"s{number:03d}" for number in range(8)]
TEXT = KEYS[1::2]


def turns(number: int) -> list[dict[str, str]]:
    said = conversation(number, 1 + number % 3)
    if KEYS[number] in TEXT:
        said[0]["value"] = said[0]["value"].removeprefix("<image>\n")
    return said


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixed")
    members, records, rows = [], [], []
    for number, key in enumerate(KEYS):
        png, record = png_bytes(noise_image(number)), {"conversations": turns(number)}
        pictures = [] if key in TEXT else [(f"{key}.png", png)]
        members += [*pictures, (f"{key}.json", json.dumps(record).encode())]
        for name, content in pictures:
            (folder / name).write_bytes(content)
        records.append({"id": key, **record} | ({"image": f"{key}.png"} if pictures else {}))
        rows.append({"id": key, **record, "image": {"bytes": png, "path": None} if pictures else None})
    (folder / "data.json").write_text(json.dumps(records))
    datasets.Dataset.from_list(rows).save_to_disk(folder / "hf")
    return {
        "json": folder / "data.json",
        "tars": write_tar(folder / "tars" / "0.tar", members),
        "hf": folder / "hf",
    }


@pytest.fixture(scope="module")
def cache(forms, teacher_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mixed-cache") / "cache"
    dump(DumpConfig(teacher=str(teacher_path), data=forms["tars"], out=out, batch_size=2))
    return out


@pytest.mark.parametrize("form", ["json", "tars", "hf"])
def test_every_form_has_the_same_samples_and_counts_their_images(forms, form):
    samples, expected = open_samples(forms[form]), open_samples(forms["json"])
    assert samples.keys == KEYS
    for index, key in enumerate(KEYS):
        assert samples[index].content_hash == expected[index].content_hash
        assert len(samples[index].images) == samples.preview(index).images == (key not in TEXT)
    encoder = SampleEncoder(tiny_processor())
    true = torch.tensor([len(encoder(samples[index])) for index in range(len(KEYS))])
    assert (torch.tensor(rough_lengths(samples, encoder)) - true).abs().max() <= 4


@pytest.mark.parametrize("stage", ["dpt", "sft", "dft"])
def test_every_stage_trains_through_steps_without_an_image(
    forms, cache, stage, tmp_path, student_path, teacher_path
):
    """One sample a step: in half of them neither V_S nor P_S runs."""
    assert all(key in LogitCache(cache) for key in KEYS)
    config = TrainConfig(
        student=str(student_path),
        teacher=str(teacher_path),
        data=forms["json"],
        cache=cache,
        out=tmp_path / "run",
        batch_size=1,
        logging_steps=1,
        stage=stage,
    )
    summary = train(config)
    assert summary.steps == len(KEYS)
    run = json.loads((config.out / "cachekd_run.json").read_text())
    norms = [entry["grad_norm"] for entry in run["log"] if "grad_norm" in entry]
    zero = sum(norm == 0 for norm in norms)
    assert zero == (len(TEXT) if stage == "dpt" else 0)


@pytest.mark.parametrize(
    "members",
    [
        [("x.json", {"image": "x.png"})],  # the file names one
        [("x.json", {}), ("x.img", None)],  # something that may be one
        [("x.json", {"conversations": conversation(0)})],  # a placeholder for one
    ],
)
def test_a_lost_image_makes_no_text_of_a_sample(tmp_path, members):
    written = [
        (name, b"?" if record is None else json.dumps({"conversations": turns(1)} | record).encode())
        for name, record in members
    ]
    samples = open_samples(write_tar(tmp_path / "x.tar", written))
    with pytest.raises(BadSample, match=r"no image|placeholders") as caught:
        samples[0]
    assert "sample 'x'" in str(caught.value)


def test_two_processes_one_of_which_has_no_image(forms, cache, tmp_path, student_path, teacher_path):
    """DDP with the projector alone: in a step one process reaches it, or none."""
    settings = {
        "student": str(student_path),
        "data": str(forms["json"]),
        "cache": str(cache),
        "stage": "dpt",
        "epochs": 2,
        "logging_steps": 1,
        "training": {"optim": "sgd"},
    }
    one, two = tmp_path / "one", tmp_path / "two"
    train(TrainConfig(**settings, batch_size=2, out=one))
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps(settings | {"batch_size": 1, "out": str(two)}))
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-6, rtol=1e-5, msg=name)
