"""The tail sketch: what it keeps, what it costs, and everything it must survive."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from cachekd.cache import (
    CachedTargets,
    LogitCache,
    LogitCacheWriter,
    OutputHead,
    SketchTail,
    TailSetting,
    TailSketch,
    TailStates,
    roundtrip,
    select_topk,
    verify_files,
)
from cachekd.cache.fidelity import gradient_cosine, loss_and_gradient
from cachekd.cache.tail.encoder import SketchEncoder, read_encoder
from cachekd.cache.tail.fit import fit_sketch
from cachekd.cache.tail.sketch import FINE_SHIFT_STEP, SHIFT_STEP
from cachekd.errors import CachekdError
from cachekd.losses.targets import DenseTargets
from cachekd.models import output_head
from caches import GOLDEN_SKETCH, header, model_states, token_ids, true_logprobs

# ---- what it keeps


def test_a_fine_step_gives_back_every_logprob():
    hidden, head = model_states(300, 16, 200)
    targets, _ = roundtrip(hidden, head, token_ids(300), tail="step=0.001", logprob_step=1e-3)
    error = (targets.everywhere() - true_logprobs(hidden, head)).abs().max()
    assert error <= 0.03  # half a step of the shift, the basis' float16


def test_axes_and_codes_equal_their_definition():
    """Slowly, in float64, from the equations of fit.py's docstring."""
    hidden, head = model_states(400, 6, 50)
    step = 0.2
    counts = torch.full((50,), 0.5).double()
    top = (hidden @ head.T).topk(50).indices  # fewer ids than the window: all of them
    counts += torch.bincount(top.flatten(), minlength=50)
    weights = counts / counts.sum()
    rows = head.double() - weights @ head.double()
    metric = sum(w * torch.outer(row, row) for w, row in zip(weights, rows, strict=True))
    values, vectors = torch.linalg.eigh(metric)
    root = vectors @ values.sqrt().diag() @ vectors.T
    centred = (hidden - hidden.mean(0)).double()
    _, axes = torch.linalg.eigh(root @ (centred.T @ centred / 400) @ root)
    y = (centred @ root @ axes).flip(1)

    records = select_topk(hidden @ head.T, token_ids(400), top_p=0.0)
    states = TailStates(hidden, (hidden @ head.T).logsumexp(-1))
    encoder = fit_sketch(OutputHead(head), states, records, TailSetting.parse(f"step={step}"))
    codes = torch.from_numpy(encoder.encode(states).coordinates)
    assert codes.shape[1] == encoder.sketch.axes <= 6
    for axis in range(codes.shape[1]):  # an axis' sign is free
        exact = y[:, axis] / step
        both = [(codes[:, axis] * sign - exact).abs().max() for sign in (1, -1)]
        assert min(both) <= 0.5 + 1e-3
    # An error of the codes costs the same in logits along every axis: metric-orthonormal.
    unit = encoder.sketch.basis.float() * encoder.sketch.unit / step
    gram = (unit.double() * weights[:, None]).T @ unit.double()
    torch.testing.assert_close(gram, torch.eye(len(gram)).double(), atol=0.05, rtol=0)


def test_finer_steps_cost_more_and_keep_more():
    hidden, head = model_states(2000, 24, 300)
    truth = true_logprobs(hidden, head)
    seen = []
    for step in (1.0, 0.3, 0.1, 0.03):
        targets, size = roundtrip(hidden, head, token_ids(2000), tail=f"step={step}", logprob_step=1e-3)
        rebuilt = targets.everywhere().log_softmax(-1)
        seen.append((size, float((truth.exp() * (truth - rebuilt)).sum(-1).mean())))
    sizes, kls = zip(*seen, strict=True)
    assert sorted(sizes) == list(sizes)
    assert sorted(kls, reverse=True) == list(kls)
    # The noise of a uniform quantiser: a third of the step, a tenth of the KL, once all axes are in use.
    assert kls[3] < kls[2] / 5


def test_exact_is_the_live_teacher_to_the_loss():
    hidden, head = model_states(600, 48, 400)
    targets, _ = roundtrip(hidden, head, token_ids(600), tail="exact")
    generator = torch.Generator().manual_seed(1)
    student = hidden @ head.T + torch.randn(600, 400, generator=generator)
    live = loss_and_gradient(student, DenseTargets(hidden @ head.T), window=128, min_k=2)
    cached = loss_and_gradient(student, targets, window=128, min_k=2)
    assert gradient_cosine(live[1], cached[1]).mean() >= 0.9998
    assert abs(cached[0].mean() / live[0].mean() - 1) < 2e-3


@pytest.mark.parametrize("budget", [4.0, 7.0, 10.0])
def test_a_budget_in_bytes_is_kept(budget, tmp_path):
    hidden, head = model_states(16_000, 24, 97)
    records = select_topk(hidden @ head.T, token_ids(16_000), top_k=32, top_p=0.0)
    states = TailStates(hidden, (hidden @ head.T).logsumexp(-1))
    encoder = fit_sketch(OutputHead(head), states, records, TailSetting.parse(f"bytes={budget}"))
    options = header() | {"codec": header(tail=f"bytes={budget}")["codec"]}
    with LogitCacheWriter(tmp_path / "c", **options, encoder=encoder) as writer:
        writer.add("a", records, bytes(16), states)
    with zipfile.ZipFile(tmp_path / "c" / "shards" / "00000.zarr.zip") as archive:
        size = sum(i.file_size for i in archive.infolist() if i.filename.startswith("sketch_coordinates/c"))
    assert size / 16_000 == pytest.approx(budget, rel=0.05)


def test_a_budget_buys_up_to_a_noise_and_exact_is_finer():
    hidden, head = model_states(500, 12, 60)
    tails = ("bytes=500", "bytes=999", "exact")
    sizes = [roundtrip(hidden, head, token_ids(500), tail=tail)[1] for tail in tails]
    assert sizes[0] == sizes[1] < sizes[2]


@pytest.mark.parametrize("scale", [0.02, 1.0, 5.0])
def test_exact_is_relative_to_the_spread_of_the_logits(scale):
    """A flat teacher's small differences are all that it says."""
    hidden, head = model_states(1000, 16, 200)
    head *= scale
    logits = hidden @ head.T
    records = select_topk(logits, token_ids(1000), top_p=0.0)
    states = TailStates(hidden, logits.logsumexp(-1))
    encoder = fit_sketch(OutputHead(head), states, records, TailSetting.parse("exact"))
    codes = torch.from_numpy(encoder.encode(states).coordinates)
    top, ids = logits.topk(128)
    error = encoder.sketch.all_logits(codes).gather(-1, ids) - top
    rounding = (error - error.mean(-1, keepdim=True)).square().mean().sqrt()
    spread = (top - top.mean(-1, keepdim=True)).square().mean().sqrt()
    assert 0.003 < rounding / spread < 0.006


def test_what_is_rare_and_large_is_kept():
    """A direction that one token in twenty uses, strongly, is worth its bytes to those tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4000, 16, generator=generator) * torch.logspace(0.5, -1, 16)
    rare = torch.rand(4000, generator=generator) < 0.05
    hidden[:, 3] = torch.where(rare, 8 * torch.randn(4000, generator=generator), 0.0)
    head = torch.linalg.qr(torch.randn(200, 16, generator=generator)).Q * 4
    targets, _ = roundtrip(hidden, head, token_ids(4000), tail="step=0.5", top_k=4)
    error = (targets.everywhere() - true_logprobs(hidden, head)).square().mean(1).sqrt()
    assert error[rare].mean() < 1.5 * error[~rare].mean()


# ---- any model


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 30),
    width=st.integers(1, 12),
    vocab=st.integers(2, 60),
    top_k=st.integers(2, 70),
    tail=st.sampled_from(["none", "exact", "bytes=4", "step=0.5", "step=30"]),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_round_trips_hold_for_any_shape(tokens, width, vocab, top_k, tail, scale, seed):
    hidden, head = model_states(tokens, width, vocab, seed)
    hidden = hidden * scale
    answers = token_ids(tokens) % vocab
    targets, size = roundtrip(hidden, head, answers, top_k=top_k, tail=tail)
    assert size > 0
    assert torch.equal(targets.token_ids, answers)
    everything = targets.everywhere()
    assert everything.shape == (tokens, vocab)
    assert not everything.isnan().any()
    truth = true_logprobs(hidden, head)
    kept = targets.logprobs.isfinite()
    stored = truth.gather(1, targets.ids.clamp(max=vocab - 1))
    farthest = 65_535 * TailSetting.parse(tail).logprob_step  # of a gap: no uint16 counts further
    near = kept & (stored > 1 - farthest)
    assert ((stored - targets.logprobs)[near].abs() <= 1 / 16 + 1 / 64 + 1e-3 + 1e-5 * scale).all()
    assert (targets.logprobs[kept & ~near] <= 2 - farthest).all()
    ids = torch.randint(0, vocab, (tokens, 5), generator=torch.Generator().manual_seed(seed))
    gathered = targets.gather(ids)
    half = 2**-11 * float((hidden @ head.T).abs().max())  # `gather` rounds logits to float16
    torch.testing.assert_close(gathered, everything.gather(1, ids), atol=0.05 + half, rtol=1e-3)


@pytest.mark.parametrize(
    "case", ["constant", "one token", "fewer tokens than dimensions", "one dimension varies"]
)
def test_degenerate_calibration_is_no_error(case):
    hidden, head = model_states(40, 24, 90)
    calibration = {
        "constant": hidden[:1].expand(500, -1),
        "one token": hidden[:1],
        "fewer tokens than dimensions": hidden[:5],
        "one dimension varies": hidden.mean(0) + torch.eye(24)[0] * torch.linspace(-1, 1, 200)[:, None],
    }[case]
    for tail in ("exact", "bytes=8"):
        targets, _ = roundtrip(hidden, head, token_ids(40), tail=tail, calibration=calibration)
        assert targets.everywhere().isfinite().all()
        everything = torch.arange(90).expand(40, -1)
        torch.testing.assert_close(targets.gather(everything), targets.everywhere(), atol=0.3, rtol=0.01)
        ids, logprobs, k = targets.leading(128, 2)
        kept = torch.arange(ids.shape[1]) < k[:, None]
        truth = true_logprobs(hidden, head).gather(1, ids)
        assert (truth - logprobs)[kept].abs().max() <= 1 / 16 + 1 / 64 + 1e-3


TINY = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPTJ = {
    "vocab_size": 120,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "tied embeddings": (LlamaForCausalLM, LlamaConfig, {**TINY, "tie_word_embeddings": True}),
    "soft cap": (Gemma2ForCausalLM, Gemma2Config, {**TINY, "final_logit_softcapping": 2.0}),
    "logit scale": (CohereForCausalLM, CohereConfig, {**TINY, "logit_scale": 0.25}),
    "logits divided": (GraniteForCausalLM, GraniteConfig, {**TINY, "logits_scaling": 8.0}),
    "bias": (GPTJForCausalLM, GPTJConfig, GPTJ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_heads_of_all_kinds_are_rebuilt(name, dtype):
    model_class, config_class, options = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**options)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.7)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    model = model.to(dtype)
    states: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: states.append(args[0]))
    ids = torch.randint(3, 120, (8, 25), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits.flatten(0, 1)
    hidden, vocab = states[0].flatten(0, 1), 110  # the last ten rows are padding
    head = output_head(model, hidden, logits, vocab)
    assert head.softcap == (2.0 if name == "soft cap" else None)
    assert (head.bias is not None) == (name == "bias")
    truth = logits[:, :vocab].float().log_softmax(-1)
    assert (head.logits(hidden).log_softmax(-1) - truth).abs().max() < (
        1e-4 if dtype == torch.float32 else 0.3
    )
    targets, _ = roundtrip(hidden, head, ids.flatten() % vocab, tail="step=0.01", top_k=8)
    error = (targets.everywhere() - truth).abs()
    assert error.mean() < (0.05 if dtype == torch.float32 else 0.1)
    assert targets.vocab_size == vocab


def test_a_head_that_is_none_is_refused():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    hidden = torch.randn(9, 32)
    with pytest.raises(CachekdError, match="do not follow from its final hidden state") as caught:
        output_head(model, hidden, torch.randn(9, 120), 120)
    assert "--tail none" in str(caught.value)


# ---- on disk


def hand_made() -> tuple[SketchEncoder, list[tuple]]:
    """A sketch in whole numbers, which no two machines compute differently, and samples for it."""
    codes = (torch.arange(97 * 3).reshape(97, 3) * 7 % 41 - 20).short()
    sketch = TailSketch(
        codes=codes,
        basis_step=1 / 64,
        offset=torch.arange(97).float() / -32,
        unit=torch.tensor([0.25, 0.5, 1.0]),
        centroids=torch.tensor([[0.25, 0.5, 1.0], [0.5, 1.0, 2.0]]),
        softcap=None,
    )
    encoder = SketchEncoder(
        sketch, 0.5, torch.zeros(3), torch.eye(3), (torch.tensor([0.0, 0.0, 1.0]), 0.5), 5, 3.0
    )
    samples = []
    for index in range(4):
        rows = 1 + index % 3
        logits = (torch.arange(rows * 97).reshape(rows, 97) * (13 + index) % 101).float() / -8
        states = TailStates(
            (torch.arange(rows * 3).reshape(rows, 3) % 5 - 2).float(), torch.arange(rows).float() / 4
        )
        targets = select_topk(logits, torch.arange(rows) + index, top_k=16, window=64, top_p=0.0)
        samples.append((f"sample/{index}", targets, bytes([index]) * 16, states))
    return encoder, samples


def write_sketched(path: Path) -> Path:
    encoder, samples = hand_made()
    options = header(top_k=16, top_p=0.0, tail="step=0.5")
    with LogitCacheWriter(path, **options, encoder=encoder, shard_tokens=4) as writer:
        for sample in samples:
            writer.add(*sample)
    return path


FILES = ("manifest.json", "sketch.zarr.zip", "dump/plan.json", "dump/00001.json", "shards/00001.zarr.zip")


def test_golden_sketches_are_read_and_written_as_ever(tmp_path):
    """Format version 1, for ever: today's reader reads it, today's writer writes it."""
    path = write_sketched(tmp_path / "c")
    for name in FILES:
        assert (path / name).read_bytes() == (GOLDEN_SKETCH / name).read_bytes(), name
    expected = json.loads((GOLDEN_SKETCH / "expected.json").read_text())
    golden = LogitCache(GOLDEN_SKETCH)
    ids = torch.tensor(expected["ids"])
    for key, rows in expected["logprobs"].items():
        gathered = golden[key].gather(ids.expand(len(rows), -1))
        torch.testing.assert_close(gathered, torch.tensor(rows), atol=1e-3, rtol=0)


def test_gather_equals_the_equations(tmp_path):
    cache = LogitCache(write_sketched(tmp_path / "c"))
    encoder, samples = hand_made()
    for key, records, _, states in samples:
        targets = cache[key]
        coordinates = states.hidden.round().clamp(-99, 99)  # the analysis is the identity
        y = coordinates * torch.tensor([0.25, 0.5, 1.0])
        shift = ((states.log_normaliser - states.hidden[:, 2] - 0.5) / SHIFT_STEP).round() * SHIFT_STEP
        logits = encoder.sketch.offset + y @ (encoder.sketch.codes.float() / 64).T
        expected = logits - shift[:, None]
        start = 0
        for row, k in enumerate(records.k.astype(int)):
            ids = torch.from_numpy(records.ids[start : start + k].astype(np.int64))
            others = [i for i in range(97) if i not in ids.tolist()]
            torch.testing.assert_close(
                targets.everywhere()[row, others], expected[row, others], atol=1e-2, rtol=0
            )
            start += k
        everything = torch.arange(97).expand(len(targets), -1)
        torch.testing.assert_close(targets.gather(everything), targets.everywhere(), atol=1e-2, rtol=0)


def test_fitting_twice_gives_the_same_bytes(tmp_path):
    hidden, head = model_states(200, 16, 60)
    files = []
    for name in ("a", "b"):
        records = select_topk(hidden @ head.T, token_ids(200), top_p=0.0)
        states = TailStates(hidden, (hidden @ head.T).logsumexp(-1))
        options = header(tail="bytes=8") | {
            "teacher": header()["teacher"].model_copy(update={"vocab_size": 60})
        }
        with LogitCacheWriter(
            tmp_path / name, **options, head=OutputHead(head), calibration_tokens=64
        ) as writer:
            for index, (part, rows) in enumerate(
                zip(records.split([20] * 10), hidden.split(20), strict=True)
            ):
                normaliser = states.log_normaliser[20 * index : 20 * index + 20]
                writer.add(str(index), part, bytes(16), TailStates(rows, normaliser))
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()})
    assert files[0] == files[1]
    manifest = LogitCache(tmp_path / "a").manifest
    assert manifest.sketches[0].calibration_tokens == 80  # the sample that reaches 64 is whole
    assert manifest.fidelity.max_error <= 1 / 16 + 1 / 64 + 1e-3
    assert 0.5 < manifest.fidelity.cosine <= 1
    assert 0 <= manifest.fidelity.kl < 1


def test_arrays_open_with_zarr_and_numcodecs_alone(tmp_path):
    path = write_sketched(tmp_path / "c")
    _, samples = hand_made()
    with zarr.storage.ZipStore(path / "shards" / "00000.zarr.zip", mode="r") as store:
        group = zarr.open_group(store, mode="r")
        assert group["sketch_coordinates"].shape[0] == 3
        count = group["sketch_coordinates"].shape[1]
        states = torch.cat([states.hidden for *_, states in samples])[:count]
        assert group["sketch_coordinates"][:].T.tolist() == states.int().tolist()
    with zarr.storage.ZipStore(path / "sketch.zarr.zip", mode="r") as store:
        assert zarr.open_group(store, mode="r")["basis"].shape == (3, 97)


def large_cache(path: Path) -> LogitCache:
    hidden, head = model_states(60, 32, 3000)
    records = select_topk(hidden @ head.T, token_ids(60), top_k=32, top_p=0.0)
    states = TailStates(hidden, (hidden @ head.T).logsumexp(-1))
    vocabulary = {"teacher": header()["teacher"].model_copy(update={"vocab_size": 3000})}
    options = header(tail="step=0.1", window=128) | vocabulary
    with LogitCacheWriter(path, **options, head=OutputHead(head)) as writer:
        for index, (part, rows) in enumerate(zip(records.split([20] * 3), hidden.split(20), strict=True)):
            normaliser = states.log_normaliser[20 * index : 20 * index + 20]
            writer.add(str(index), part, bytes(16), TailStates(rows, normaliser))
    return LogitCache(path)


@pytest.mark.parametrize("start", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_targets_travel_to_other_processes_without_their_basis(tmp_path, start):
    cache = large_cache(tmp_path / "c")
    targets = cache["1"]
    assert isinstance(targets.tail, SketchTail)
    basis = targets.tail.sketch.codes.nbytes
    assert len(pickle.dumps(targets)) < basis / 4
    with multiprocessing.get_context(start).Pool(1) as pool:
        there = pool.map(_first_logprobs, [targets, cache["2"]])
    assert there[0] == _first_logprobs(targets)
    assert there[1] == _first_logprobs(cache["2"])


def _first_logprobs(targets: CachedTargets) -> list[float]:
    return targets.gather(torch.arange(5).expand(len(targets), -1))[0].tolist()


def test_targets_of_a_roundtrip_outlive_its_files():
    hidden, head = model_states(20, 8, 60)
    targets, _ = roundtrip(hidden, head, token_ids(20))
    for again in (copy.deepcopy(targets), pickle.loads(pickle.dumps(targets))):
        torch.testing.assert_close(again.everywhere(), targets.everywhere())


def test_no_tokens_and_no_ids_are_no_error():
    hidden, head = model_states(20, 8, 60)
    targets, _ = roundtrip(hidden, head, token_ids(20))
    nothing = targets.select(torch.arange(0))
    assert nothing.gather(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5)
    assert targets.gather(torch.zeros(20, 0, dtype=torch.long)).shape == (20, 0)
    student = torch.zeros(0, 60, requires_grad=True)
    assert float(loss_and_gradient(student, nothing, window=128, min_k=2)[0].sum()) == 0


def test_targets_of_several_samples_stay_in_order(tmp_path):
    cache = LogitCache(write_sketched(tmp_path / "c"))
    together = CachedTargets.cat([cache[key] for key in cache])
    torch.testing.assert_close(together.everywhere()[3:6], cache["sample/2"].everywhere())


def test_a_cache_that_was_made_anew_in_the_same_place_is_read_anew(tmp_path):
    seen = []
    for step in (0.5, 0.01):
        hidden, head = model_states(50, 8, 97)
        records = select_topk(hidden @ head.T, token_ids(50), top_p=0.0)
        states = TailStates(hidden, (hidden @ head.T).logsumexp(-1))
        with LogitCacheWriter(tmp_path / "c", **header(tail=f"step={step}"), head=OutputHead(head)) as writer:
            writer.add("a", records, bytes(16), states)
        rebuilt = LogitCache(tmp_path / "c")["a"].everywhere()
        seen.append(float((rebuilt - true_logprobs(hidden, head)).abs().mean()))
        shutil.rmtree(tmp_path / "c")
    assert seen[1] < seen[0] / 2


# ---- what can go wrong


def test_damage_to_the_sketch_is_seen(tmp_path):
    path = write_sketched(tmp_path / "c")
    file = path / "sketch.zarr.zip"
    content = file.read_bytes()
    for position in range(0, len(content), len(content) // 60):
        shutil.copytree(path, tmp_path / str(position))
        other = tmp_path / str(position)
        (other / "sketch.zarr.zip").write_bytes(
            content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]
        )
        assert [finding.path for finding in verify_files(other)] == [other / "sketch.zarr.zip"]
        with pytest.raises(CachekdError, match="damaged"):
            LogitCache(other)["sample/1"]
    file.write_bytes(content[:-5])
    with pytest.raises(CachekdError, match="was cut short"):
        LogitCache(path)
    file.unlink()
    with pytest.raises(CachekdError, match="is missing"):
        LogitCache(path)


@pytest.mark.parametrize("text", ["", "bytes", "bytes=", "bytes=-3", "bytes=0", "64", "exactly", "step=x"])
def test_unknown_tails_are_explained(text):
    with pytest.raises(CachekdError, match="unknown tail") as caught:
        TailSetting.parse(text)
    assert "bytes=64" in str(caught.value)


def test_a_sketch_without_what_it_needs_is_refused(tmp_path):
    hidden, head = model_states(5, 4, 97)
    records = select_topk(hidden @ head.T, token_ids(5), top_k=32, window=64)
    with pytest.raises(CachekdError, match="needs the teacher's output head"):
        LogitCacheWriter(tmp_path / "a", **header(tail="exact"))
    with (
        pytest.raises(CachekdError, match="needs the teacher's hidden states"),
        LogitCacheWriter(tmp_path / "b", **header(tail="exact"), head=OutputHead(head)) as writer,
    ):
        writer.add("a", records, bytes(16))
    with pytest.raises(CachekdError, match="do not fit the output head"):
        roundtrip(hidden, head, token_ids(5), calibration=hidden[:0])
    broken = hidden.clone()
    broken[2, 1] = float("nan")
    with pytest.raises(CachekdError, match="not finite"):
        fit_sketch(OutputHead(head), TailStates(broken, broken.sum(1)), records, TailSetting.parse("exact"))
    encoder, _ = hand_made()
    with pytest.raises(CachekdError, match="the codec's tail is none"):
        LogitCacheWriter(tmp_path / "c", **header(), encoder=encoder)
    with pytest.raises(CachekdError, match="does not fit the vocabulary"):
        LogitCacheWriter(tmp_path / "d", **header(tail="exact"), head=OutputHead(head[:50]))
    banned = torch.zeros(97).index_fill(0, torch.tensor([3]), float("-inf"))
    with pytest.raises(CachekdError, match="bias is not finite"):
        roundtrip(hidden, OutputHead(head, banned), token_ids(5), tail="exact")
    assert not list(tmp_path.rglob("*.zip"))


def test_a_failure_to_measure_leaves_the_cache(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise MemoryError("the GPU is full")

    monkeypatch.setattr("cachekd.cache.fidelity.measure_fidelity", fail)
    large_cache(tmp_path / "c")
    cache = LogitCache(tmp_path / "c")
    assert verify_files(cache.path) == []
    assert len(cache) == 3
    assert cache.manifest.fidelity is None


def test_an_exact_cache_keeps_the_shift_finer_than_its_step(tmp_path):
    """An axis of its own takes the rest; it is read like any other, and a resumed dump codes with it too."""
    hidden, head = model_states(1000, 16, 200)
    logits = hidden @ head.T
    records = select_topk(logits, token_ids(1000), top_p=0.0)
    states = TailStates(hidden, logits.logsumexp(-1))
    for tail, finest in (("exact", FINE_SHIFT_STEP), ("step=0.001", SHIFT_STEP)):
        encoder = fit_sketch(OutputHead(head), states, records, TailSetting.parse(tail))
        assert encoder.has_shift_axis == (tail == "exact")
        (tmp_path / f"{tail}.zip").write_bytes(encoder.pack())
        encoder = read_encoder(tmp_path / f"{tail}.zip")
        codes = encoder.encode(states)
        rebuilt = SketchTail.from_codes(encoder.sketch, codes).everywhere(200)
        off = (rebuilt - logits.log_softmax(-1)).mean(-1)  # what all ids of a token have in common
        assert finest / 8 < off.std() < finest
        assert off.mean().abs() < finest
