"""Losses over hidden states in chunks: the same numbers as over all logits at once, in less memory."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from cachekd.data import SampleEncoder, collate, predicting_positions, sample_from_llava
from cachekd.losses import chunk_tokens, cross_entropy_loss, dbild_loss, summed_over_chunks
from cachekd.losses.chunked import CHUNK_BYTES, LiveTargets
from cachekd.losses.targets import DenseTargets
from cachekd.models import DeferredHead, logits_at
from tiny import noise_image, tiny_processor, tiny_vlm

TOKENS, WIDTH, VOCAB, PADDED = 23, 12, 150, 160
SETTINGS = {"window": 32, "min_k": 2, "temperature": 3.0}


def random_problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, head with padding rows, answer tokens and teacher logits, all in float64."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    head = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    return states, head, torch.randint(VOCAB, (TOKENS,), generator=generator), teacher


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 99])
def test_chunks_equal_the_plain_loss_in_value_and_gradient(chunk, softcap):
    states, head, ids, teacher = random_problem()

    def logits_of(rows: Tensor, weight: Tensor) -> Tensor:
        logits = rows @ weight.T
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    a, b = (x.clone().requires_grad_() for x in (states, head))
    logits = logits_of(a, b)
    plain = {
        "ce": torch.nn.functional.cross_entropy(logits, ids, reduction="sum"),
        "align": dbild_loss(logits[:, :VOCAB], DenseTargets(teacher, ids), reduction="sum", **SETTINGS),
    }
    (plain["ce"] + 0.7 * plain["align"]).backward()

    c, d = (x.clone().requires_grad_() for x in (states, head))
    targets = DenseTargets(teacher, ids)

    def loss(some: Tensor, rows: Tensor) -> dict[str, Tensor]:
        logits = logits_of(some, d)
        aligned = dbild_loss(logits[:, :VOCAB], targets.select(rows), reduction="sum", **SETTINGS)
        return {"ce": cross_entropy_loss(logits, ids[rows], reduction="sum"), "align": aligned}

    chunked = summed_over_chunks(loss, c, chunk)
    (chunked["ce"] + 0.7 * chunked["align"]).backward()
    for name, value in plain.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(c.grad, a.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_no_chunk_sees_more_rows_than_it_may_and_no_tokens_are_zero_loss():
    states, head, ids, _ = random_problem()
    seen = []

    def loss(some: Tensor, rows: Tensor) -> dict[str, Tensor]:
        seen.append(len(rows))
        return {"ce": cross_entropy_loss(some @ head.T, ids[rows], reduction="sum")}

    states.requires_grad_()
    summed_over_chunks(loss, states, 10)["ce"].backward()
    assert seen == [10, 10, 3, 3, 10, 10]  # forward, then each again in the backward
    nothing = summed_over_chunks(loss, states[:0], 10)["ce"]
    assert nothing.item() == 0


def test_the_default_chunk_is_a_share_of_memory():
    assert chunk_tokens(151_936) * 151_936 * 4 <= CHUNK_BYTES < (chunk_tokens(151_936) + 1) * 151_936 * 4
    assert chunk_tokens(10**12) == 1


def test_live_targets_are_dense_targets_of_a_few_tokens():
    states, head, ids, _ = random_problem()
    targets = LiveTargets(ids, states, lambda some: some @ head.T, VOCAB)
    rows = torch.tensor([4, 0, 22])
    expected = DenseTargets((states @ head.T)[:, :VOCAB], ids).select(rows)
    torch.testing.assert_close(targets.select(rows).logprobs, expected.logprobs)
    assert torch.equal(targets.select(rows).token_ids, ids[rows])
    assert len(targets) == TOKENS


# ---- the head, put off


@pytest.fixture(scope="module")
def batch():
    processor = tiny_processor()
    turns = [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": "a large green dog."}]
    samples = [sample_from_llava(str(i), turns, (noise_image(i),), origin="test") for i in range(2)]
    encoder = SampleEncoder(processor)
    inputs = collate([encoder(sample) for sample in samples], processor.tokenizer.pad_token_id)
    return inputs, predicting_positions(inputs.pop("supervised"))


def wrapped(kind: str, dtype: torch.dtype):
    """A model whose wrapper does something to its logits."""
    model = tiny_vlm(tiny_processor(), vocab_size=448).to(dtype)
    changes = {
        "plain": lambda logits: logits,
        "scale": lambda logits: logits * 0.0625,
        "soft cap": lambda logits: 0.25 * (logits / 0.25).tanh(),
        "odd": lambda logits: logits.abs(),
    }

    def change(_module, _args, output):
        output.logits = changes[kind](output.logits)
        return output

    if kind == "soft cap":
        model.config.text_config.final_logit_softcapping = 0.25
    model.register_forward_hook(change)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "scale", "soft cap", "odd"])
def test_a_head_put_off_gives_the_wrappers_logits(batch, kind, dtype, caplog):
    inputs, positions = batch
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
    model = wrapped(kind, dtype)
    with caplog.at_level(logging.WARNING):
        head = DeferredHead(model, inputs, positions)
    assert (head.reason is not None) == (kind == "odd")
    assert ("whole batch" in caplog.text) == (kind == "odd")
    expected = logits_at(model, inputs, positions)
    states = head.states(lambda: logits_at(model, inputs, positions))
    assert states.shape == (int(positions.sum()), 448 if kind == "odd" else 32)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(head.logits(states), expected, **close)
    assert torch.equal(logits_at(model, inputs, positions), expected)  # the hook is gone


def test_gradients_through_a_head_put_off_are_the_wrappers(batch):
    inputs, positions = batch
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    gradients = []
    for put_off in (False, True):
        model = wrapped("plain", torch.float64)
        if put_off:
            head = DeferredHead(model, inputs, positions)
            states = head.states(lambda model=model: logits_at(model, inputs, positions))

            def loss(some, _rows, head=head):
                return {"x": head.logits(some).square().sum()}

            summed_over_chunks(loss, states, 3)["x"].backward()
        else:
            logits_at(model, inputs, positions).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)
