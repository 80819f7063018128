"""`float32_head`: a teacher in half precision, whose logits are not rounded once more."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from cachekd.cache import LogitCache
from cachekd.cache.plan import read_plan
from cachekd.config import DumpConfig
from cachekd.data import open_samples
from cachekd.data.collate import ModelInputs, collate
from cachekd.dump import dump
from cachekd.dump.plan import codec_of, command_of
from cachekd.dump.run import load_teacher, teacher_files
from cachekd.errors import CachekdError
from cachekd.models import hidden_and_logits_at
from caches import SMALL, dump_cache


def config(teacher: Path, data: Path, out: Path, **settings) -> DumpConfig:
    return DumpConfig(
        teacher=str(teacher),
        data=str(data),
        out=out,
        dtype="bfloat16",
        **SMALL | {"float32_head": True} | settings,
    )


@pytest.mark.parametrize("tail", ["bytes=64", "none"])
def test_the_logits_are_those_of_the_head_in_float32(tmp_path, teacher_path, data_path, tail):
    settings = config(teacher_path, data_path, tmp_path / "c", tail=tail)
    samples, files = open_samples(data_path), teacher_files(str(teacher_path), settings)
    loaded = {
        on: load_teacher(files, samples, "stop", codec_of(settings), "bfloat16", float32_head=on)
        for on in (True, False)
    }
    encoded = [files.encoder(samples[index]) for index in range(3)]
    hidden, logits, token_ids, _ = loaded[True].forward(encoded)
    model = loaded[True].model
    batch = ModelInputs.of(collate(encoded, files.encoder.pad_token_id))
    states, rounded = hidden_and_logits_at(model, batch.tensors, batch.positions)
    assert torch.equal(hidden, states)
    assert torch.equal(token_ids, batch.token_ids)
    exact = states.double() @ model.lm_head.weight.double().T
    assert logits.dtype == torch.float32
    assert (logits - exact[:, : logits.shape[1]]).abs().max() < 1e-5
    assert (rounded - exact).abs().max() > 1e-4
    assert torch.equal(loaded[False].forward(encoded)[1], rounded)
    for teacher in loaded.values():
        assert (teacher.head is None) is (tail == "none")


def test_a_cache_says_so_and_is_compared_with_that_teacher(tmp_path, teacher_path, data_path):
    found = {}
    for on in (True, False):
        out = dump_cache(
            tmp_path / str(on),
            teacher_path,
            data_path,
            dtype="bfloat16",
            float32_head=on,
            tail="exact",
        )
        cache = LogitCache(out)
        assert cache.manifest.sources[0].float32_head is on
        assert cache.manifest.teacher.dtype == "bfloat16"
        found[on] = cache.manifest.fidelity
        assert found[on].max_error < 0.07  # a step of 1/16, half of it to each side, and the tail's
        assert (b"float32_head" in (out / "manifest.json").read_bytes()) is on
    assert found[True] != found[False]


def test_a_dump_goes_on_as_it_began(tmp_path, teacher_path, data_path):
    out = tmp_path / "c"
    dump(config(teacher_path, data_path, out))
    with pytest.raises(CachekdError, match="different setting float32_head"):
        dump(config(teacher_path, data_path, out, float32_head=False))
    words = shlex.split(command_of(read_plan(out / "dump" / "plan.json"), out, skips=False))
    place = words.index("--float32-head")
    assert words[place + 1 :] == [] or words[place + 1].startswith("--")
    assert dump(config(teacher_path, data_path, out)).new_tokens == 0
