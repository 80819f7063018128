"""Encoding, in this process or in workers: the same samples, in order, and errors as they are."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from cachekd.data import Encoded, SampleEncoder, open_samples, read_encoded, sample_from_record
from cachekd.errors import BadSample, CachekdError
from tiny import (
    ANSWERED,
    PLAIN_TEMPLATE,
    noise_image,
    plain_error,
    tar_members,
    tiny_processor,
    write_llava_json,
    write_tar,
)


def test_a_processor_or_template_that_raises_makes_a_bad_sample():
    sample = sample_from_record("odd one", {"image": noise_image(0), "messages": ANSWERED}, origin="test")
    raising = SampleEncoder(tiny_processor(template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(BadSample, match="roles must alternate") as caught:
        raising(sample)
    assert "'odd one'" in str(caught.value)
    strict = tiny_processor(template=PLAIN_TEMPLATE)
    strict.image_processor.do_resize = False
    strict.image_processor.crop_size = {"no such": 1}
    with pytest.raises(BadSample, match=r"the processor cannot encode the sample\n.*'odd one'"):
        SampleEncoder(strict)(sample)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Tars with good samples, a broken image (7) and one without an answer (12)."""
    folder = tmp_path_factory.mktemp("mixed")
    members = tar_members(20)
    members[14] = (members[14][0], members[14][1][:60])
    members[25] = (members[25][0], json.dumps({"messages": ANSWERED[:1]}).encode())
    write_tar(folder / "0.tar", members[:20])
    write_tar(folder / "1.tar", members[20:])
    return folder


@pytest.fixture(params=["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def same(a: Encoded | BadSample, b: Encoded | BadSample) -> bool:
    if isinstance(a, BadSample) or isinstance(b, BadSample):
        return type(a) is type(b) and str(a) == str(b)
    tensors = all(torch.equal(a.inputs[name], b.inputs[name]) for name in b.inputs)
    return tensors and torch.equal(a.supervised, b.supervised) and a.content_hash == b.content_hash


def test_workers_give_what_this_thread_gives_in_order(mixed, start_method, capfd):
    samples, encoder = open_samples(mixed, shuffle_seed=1), SampleEncoder(tiny_processor())
    indices = [5, 19, 0, 7, 7, *range(20)]
    state = torch.get_rng_state()
    direct = list(read_encoded(samples, encoder, indices, workers=0))
    descriptors = len(os.listdir("/proc/self/fd"))
    workers = read_encoded(samples, encoder, indices, workers=2 if start_method == "fork" else 1)
    read = [next(workers) for _ in range(10)]
    read += list(workers)
    keys = [one.key if isinstance(one, Encoded) else str(one.where).split("'")[1] for one in direct]
    assert keys == [samples.keys[index] for index in indices]
    assert len(read) == len(direct)
    assert all(same(a, b) for a, b in zip(read, direct, strict=True))
    assert sum(isinstance(one, BadSample) for one in read[5:]) == 2
    assert torch.equal(state, torch.get_rng_state())
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 4  # all samples are held, none holds a file
    assert not multiprocessing.active_children()
    assert "TOKENIZERS_PARALLELISM" not in capfd.readouterr().err


def test_an_error_of_the_data_set_comes_out_of_a_worker_as_it_is(mixed, tmp_path):
    folder = Path(shutil.copytree(mixed, tmp_path / "d"))
    samples, encoder = open_samples(folder), SampleEncoder(tiny_processor())
    (folder / "1.tar").unlink()
    results = read_encoded(samples, encoder, range(20), workers=1)
    for _ in range(10):
        next(results)
    with pytest.raises(CachekdError, match=r"^the tar does not exist") as caught:
        next(results)
    assert "DataLoader" not in plain_error(caught)
    assert caught.value.where == str(folder / "1.tar")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_early_stops_and_nothing_runs_ahead(mixed, workers):
    samples, encoder = open_samples(mixed), SampleEncoder(tiny_processor())
    results = read_encoded(samples, encoder, range(20), workers=workers)
    assert isinstance(next(results), Encoded)
    assert len(multiprocessing.active_children()) == workers
    results.close()
    assert not multiprocessing.active_children()
    assert list(read_encoded(samples, encoder, [], workers=workers)) == []


class Reads:
    """Samples that note what is read, and can end the process that reads."""

    def __init__(self, samples, folder: Path, deadly: int | None = None) -> None:
        self.samples, self.keys, self.folder, self.deadly = samples, samples.keys, folder, deadly

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if index == self.deadly:
            os._exit(9)
        (self.folder / str(index)).touch()
        return self.samples[index]


def test_reading_ahead_is_bounded(tmp_path: Path):
    samples = Reads(open_samples(write_llava_json(tmp_path / "d", 40)), tmp_path / "read")
    samples.folder.mkdir()
    encoder = SampleEncoder(tiny_processor())
    results = read_encoded(samples, encoder, range(40), workers=0)
    next(results)
    assert len(list(samples.folder.iterdir())) == 1
    results = read_encoded(samples, encoder, range(40), workers=1)
    next(results)
    time.sleep(0.5)
    assert 1 <= len(list(samples.folder.iterdir())) <= 4 * 3
    results.close()


def test_a_worker_that_dies_is_told_plainly(tmp_path: Path):
    samples = Reads(open_samples(write_llava_json(tmp_path / "d", 9)), tmp_path, deadly=5)
    results = read_encoded(samples, SampleEncoder(tiny_processor()), range(9), workers=1)
    with pytest.raises(CachekdError, match="a process that reads samples died") as caught:
        list(results)
    plain_error(caught)
    assert not multiprocessing.active_children()
