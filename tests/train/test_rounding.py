"""A student in bfloat16: what is rounded at random is right on average, and the same in every session."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.models import load_model
from cachekd.paths import RUN_FILE
from cachekd.train import estimate, train
from cachekd.train.open import checked_arguments, make_trainer
from cachekd.train.rounding import BY_PARAMETER, round_at_random, rounds_at_random
from runs import CutShort, losses

BF16 = torch.bfloat16
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture
def in_bfloat16(settings) -> dict:
    return settings | {"dtype": "bfloat16", "student_dtype": "bfloat16"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 towards zero and the one away from it, as the bits tell; alike where one is exact."""
    bits = values.view(torch.int32)
    inner = bits & -(1 << 16)
    outer = torch.where(bits == inner, inner, inner + (1 << 16))
    return inner.view(torch.float32).to(BF16), outer.view(torch.float32).to(BF16)


@settings(max_examples=60, deadline=None)
@given(st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100))
def test_the_mean_of_many_roundings_is_the_value(value):
    values = torch.full((20_000,), value, dtype=torch.float32)
    rounded = round_at_random(values, generator(7))
    inner, outer = neighbours(values)
    assert ((rounded == inner) | (rounded == outer)).all()
    x, low, high = (float(some[0].double()) for some in (values, inner, outer))
    share = 0.0 if low == high else (x - low) / (high - low)
    deviation = (share * (1 - share) / len(values)) ** 0.5
    assert abs((rounded == outer).double().mean().item() - share) <= 5 * deviation + (low == high)


def test_what_is_exact_or_not_finite_stays():
    exact = torch.randn(1000, generator=generator()).to(BF16)
    assert torch.equal(round_at_random(exact.float(), generator()), exact)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    found = round_at_random(odd, generator())
    assert torch.equal(found.nan_to_num(nan=5.0), odd.to(BF16).nan_to_num(nan=5.0))
    assert torch.equal(found.signbit(), odd.to(BF16).signbit())
    odd_nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # all bits set: a carry would lead on
    assert round_at_random(odd_nan, generator()).isnan().all()


# ---- the optimizers


@pytest.mark.parametrize("places", ["first", "second"])
def test_what_is_to_have_moments_in_32_bits_has_them(places):
    """The Trainer says so of embeddings; bitsandbytes finds them by their place in a group."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    found = {}
    for dtype in (torch.float32, BF16):
        embedding, other, more = (nn.Parameter(torch.ones(128, 64, dtype=dtype)) for _ in range(3))
        module = nn.Module()
        module.weight = embedding
        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        manager.register_module_override(module, "weight", {"optim_bits": 32})
        order = [embedding, other, more] if places == "first" else [other, embedding, more]
        optimizer = bitsandbytes.optim.AdamW8bit(order, lr=1e-3)
        rounds_at_random(optimizer, 0, lambda: 1)
        stepped(optimizer, order, 1)
        found[dtype] = [optimizer.state[p]["state1"].dtype for p in (embedding, other, more)]
    assert found[BF16] == found[torch.float32] == [torch.float32, torch.uint8, torch.uint8]


def an_optimizer(name: str, parameters: list[nn.Parameter], lr: float, tmp_path) -> torch.optim.Optimizer:
    """As the Trainer makes it."""
    arguments = TrainingArguments(str(tmp_path), optim=name, learning_rate=lr, use_cpu=True, report_to=[])
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(parameters, **settings)


def available() -> list[str]:
    """The names whose package is installed, in a fixed order."""
    names = []
    for name in sorted(BY_PARAMETER):
        try:
            Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("x", optim=name, report_to=[]))
        except (ImportError, ValueError):
            continue
        names.append(name)
    return names


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    """Steps of gradients that are the same in every dtype, most of one sign."""
    noise = generator(5)
    for _ in range(steps):
        for parameter in parameters:
            gradient = (torch.randn(parameter.shape, generator=noise) + 0.5).to(BF16) * 2**-10
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    some = [torch.randn(128, 96, generator=generator(3)) / 20, torch.ones(64)]
    return [nn.Parameter(one.to(BF16).to(dtype)) for one in some]


@pytest.mark.parametrize("name", available())
@pytest.mark.filterwarnings("ignore:.*[Pp]aged:UserWarning")
def test_a_step_of_each_optimizer_is_that_of_float32_rounded(tmp_path, name):
    full, half = weights(torch.float32), weights(BF16)
    beside = nn.Parameter(torch.ones(8, 8))  # in float32, as a bridge's are
    alone = nn.Parameter(torch.ones(8, 8))
    reference = an_optimizer(name, [*full, alone], 1e-3, tmp_path)
    optimizer = an_optimizer(name, [*half, beside], 1e-3, tmp_path)
    rounds_at_random(optimizer, 0, lambda: 0)
    rounds_at_random(optimizer, 0, lambda: 0)  # once is enough
    stepped(reference, [*full, alone], 1)
    stepped(optimizer, [*half, beside], 1)
    for one, other in zip(full, half, strict=True):
        inner, outer = neighbours(one.detach())
        assert ((other == inner) | (other == outer)).all()
        assert other.dtype == other.grad.dtype == BF16
        assert not torch.equal(one.detach(), other.float())
    assert torch.equal(alone, beside)
    assert [group["params"] for group in optimizer.param_groups] == [[*half, beside]]
    for state in optimizer.state.values():
        assert all(x.dtype != BF16 for x in state.values() if torch.is_tensor(x))


@pytest.mark.parametrize("name", [n for n in available() if "adamw" in n])
@pytest.mark.filterwarnings("ignore:.*[Pp]aged:UserWarning")
def test_small_steps_are_lost_by_rounding_to_the_nearest_alone(tmp_path, name):
    """16 steps at a fine-tuning's 2e-5: a fifth of the weights moves, by a sixth of the way."""

    def way(dtype: torch.dtype, *, at_random: bool) -> tuple[float, Tensor]:
        parameters = weights(dtype)
        before = [parameter.detach().float().clone() for parameter in parameters]
        optimizer = an_optimizer(name, parameters, 2e-5, tmp_path)
        counted = iter(range(99))
        if at_random:
            rounds_at_random(optimizer, 0, lambda: next(counted))
        stepped(optimizer, parameters, 16)
        pairs = zip(parameters, before, strict=True)
        steps = torch.cat([(p.detach().float() - b).flatten() for p, b in pairs])
        return (steps != 0).double().mean().item(), steps

    _, true = way(torch.float32, at_random=False)

    def share(steps: Tensor) -> float:
        return float(steps @ true / (true @ true))

    moved, steps = way(BF16, at_random=False)
    assert moved < 0.3
    assert share(steps) < 0.3
    moved, steps = way(BF16, at_random=True)
    assert moved > 0.55
    assert share(steps) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["adamw_torch_fused", *[n for n in available() if "8bit" in n]])
@pytest.mark.filterwarnings("ignore:.*[Pp]aged:UserWarning")
def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path, name):
    """torch and bitsandbytes cast the moments that they load to the parameters' dtype."""

    def begun(parameters: list[nn.Parameter], step: int) -> torch.optim.Optimizer:
        optimizer = an_optimizer(name, parameters, 1e-3, tmp_path)
        rounds_at_random(optimizer, 0, lambda: step)
        return optimizer

    whole = weights(BF16)
    first = begun(whole, 0)
    stepped(first, whole, 2)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    resumed = copy.deepcopy(whole)
    second = begun(resumed, 0)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    torch.manual_seed(99)  # nothing depends on it
    for optimizer, parameters in ((first, whole), (second, resumed)):
        stepped(optimizer, parameters, 2)
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))
    assert all(parameter.dtype == BF16 for parameter in resumed)


def test_each_step_and_each_seed_has_noise_of_its_own():
    def after(seed: int, step: int) -> Tensor:
        parameter = weights(BF16)[0]
        optimizer = torch.optim.SGD([parameter], lr=1e-3)
        rounds_at_random(optimizer, seed, lambda: step)
        stepped(optimizer, [parameter], 1)
        return parameter.detach()

    assert torch.equal(after(0, 0), after(0, 0))  # as in two processes
    for other in ((0, 1), (1, 0)):
        assert not torch.equal(after(0, 0), after(*other))


# ---- the run


def test_a_run_in_bfloat16_learns_and_goes_on_bit_for_bit(tmp_path, in_bfloat16):
    whole = TrainConfig(**in_bfloat16, save_steps=1)
    train(whole)
    cut = whole.model_copy(update={"out": tmp_path / "cut"})
    with pytest.raises(KeyboardInterrupt):
        train(cut, [CutShort(3)])
    assert train(cut).resumed_from == 3
    assert losses(cut.out) == losses(whole.out)
    one, other = (load_file(run.out / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {weight.dtype for weight in one.values()} == {BF16}
    in_full = TrainConfig(**in_bfloat16 | {"student_dtype": "float32", "out": tmp_path / "full"})
    train(in_full)
    wanted = [row[0] for row in losses(in_full.out)]
    assert wanted[-1] < wanted[0] - 0.1
    assert [row[0] for row in losses(whole.out)] == pytest.approx(wanted, abs=0.02)


def test_adapters_on_a_bfloat16_student_train_in_float32(in_bfloat16):
    config = TrainConfig(**in_bfloat16, lora=LORA)
    trainer = make_trainer(config, config.out)
    dtypes = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: BF16}
    train(config)
    assert json.loads((config.out / RUN_FILE).read_text())["config"]["student_dtype"] == "bfloat16"
    load_model(str(config.out), dtype=torch.float32, device=torch.device("cpu"))


def test_weights_and_gradients_take_half_of_the_memory(in_bfloat16):
    parts = {
        dtype: estimate.estimate_training(TrainConfig(**in_bfloat16 | {"student_dtype": dtype})).memory
        for dtype in ("float32", "bfloat16")
    }
    full, half = parts["float32"], parts["bfloat16"]
    assert half["gradients"] * 2 == full["gradients"]
    assert half["optimizer"] == full["optimizer"]
    assert half["student"] * 2 == pytest.approx(full["student"], rel=1e-3)  # token positions are integers


# ---- what does not go


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dtype": "float32"}, "--dtype bfloat16"),
        ({"dtype": "float16"}, "--dtype bfloat16"),
        ({"training": {"optim": "adagrad"}}, "one of adafactor"),
        ({"training": {"optim": "adagrad"}, "lora": {"r": 2, "bias": "all"}}, "one of adafactor"),
        ({"training": {"fsdp": True}}, "mixed precision of their own"),
    ],
)
def test_what_it_cannot_be_trained_with_is_refused(tmp_path, in_bfloat16, changed, says):
    with pytest.raises(CachekdError, match=re.escape(says)):
        checked_arguments(TrainConfig(**in_bfloat16 | changed), tmp_path)


def test_the_names_are_the_trainers():
    assert {name.value for name in OptimizerNames} >= BY_PARAMETER


def tensors_in(state: dict) -> list[Tensor]:
    """bitsandbytes saves its own in a mapping of their own."""
    return [x for v in state.values() for x in (tensors_in(v) if isinstance(v, dict) else [v])]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_an_optimizer_of_eight_bits_moves_what_trains_and_goes_on_bit_for_bit(tmp_path, settings, lora):
    pytest.importorskip("bitsandbytes")
    training = {"optim": "adamw_bnb_8bit"}
    whole = TrainConfig(**settings, lora=lora, training=training, save_steps=3, keep_checkpoints=True)
    train(whole)
    cut = whole.model_copy(update={"out": tmp_path / "cut"})
    with pytest.raises(KeyboardInterrupt):
        train(cut, [CutShort(4)])
    assert train(cut).resumed_from == 3
    assert losses(cut.out) == losses(whole.out)
    saved = torch.load(cut.out / "checkpoints" / "checkpoint-6" / "optimizer.pt")["state"]
    kept = [x.dtype for state in saved.values() for x in tensors_in(state) if torch.is_tensor(x)]
    assert (torch.uint8 in kept) is (lora is None)  # adapters are smaller than what it keeps in 8 bits
    before, after = (load_file(f"{path}/model.safetensors") for path in (whole.student, whole.out))
    still = [name for name in after if torch.equal(after[name], before[name])]
    unused = [name for name in after if "post_layernorm" in name]
    assert (still == unused) is (lora is None)  # embeddings and norms have no adapters
    reference = TrainConfig(**settings | {"out": tmp_path / "adamw"}, lora=lora)
    train(reference)
    assert [row[0] for row in losses(whole.out)] == pytest.approx(
        [row[0] for row in losses(reference.out)], abs=5e-3
    )
