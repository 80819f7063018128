"""Quantised weights, by the packages that transformers quantises with. No other module knows them by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from cachekd.cache.quantization import QuantizationInfo
from cachekd.errors import CachekdError, first_line
from cachekd.models.families import TEXT_ONLY, family_of, vision_tower
from cachekd.models.parts import parameters_by_part

Setting = str | Mapping[str, Any]
PRESETS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8bit": {"load_in_8bit": True},
}


class Backend(NamedTuple):
    """A package that quantises weights while they are loaded.

    Attributes:
        package: as pip knows it.
        skips: its setting that names the modules which stay as they are.
        example: settings, for people.
    """

    package: str
    skips: str
    example: str


# By transformers' quant_method.
BACKENDS = {
    "bitsandbytes": Backend("bitsandbytes", "llm_int8_skip_modules", "4bit, 8bit or load_in_4bit: true"),
    "torchao": Backend("torchao", "modules_to_not_convert", "quant_type: Int8WeightOnlyConfig"),
    "quanto": Backend("optimum-quanto", "modules_to_not_convert", "weights: int8"),
}
_COMPUTES_IN = "bnb_4bit_compute_dtype"
_A_BLOCK, _SCALE = 64, 4  # bitsandbytes': weights of 4 bits that share a scale, and a scale's bytes


def quantization_config(
    setting: Setting, model: PreTrainedModel | None = None, dtype: torch.dtype | None = None
) -> Any:
    """transformers' config for a preset of `PRESETS`, or for `{"quant_method": ..., ...}`.

    Args:
        setting: of torchao, `quant_type` may be the name of one of its config classes.
        model: whose head and vision encoder stay as they are, whatever the setting skips besides; its weights
            are not looked at. None: nothing is added to the setting.
        dtype: that 4-bit products are computed in, where the setting does not say it.

    Raises:
        CachekdError: no such backend, it is not installed, or it has no such setting.
    """
    given = _mapping(setting)
    settings = dict(given)
    method = _method(settings)
    if method not in BACKENDS:
        backends = (f"{name} ({backend.example})" for name, backend in BACKENDS.items())
        raise CachekdError(
            "there is no such quantisation" if method else "no quantisation is named",
            where=_shown(given),
            expected=f"quant_method, one of {', '.join(backends)}",
            found=method or None,
        )
    backend = BACKENDS[method]
    _require_installed(method)
    if method == "bitsandbytes" and dtype is not None:
        settings.setdefault(_COMPUTES_IN, str(dtype).removeprefix("torch."))
    if model is not None:
        settings[backend.skips] = sorted({*(settings.get(backend.skips) or ()), *left_whole(model)})
    try:
        if method == "torchao" and isinstance(settings.get("quant_type"), str):
            settings["quant_type"] = {"default": _torchaos(settings["quant_type"])}
        config = AutoQuantizationConfig.from_dict(settings)
    except (TypeError, ValueError, ImportError, AttributeError, AssertionError, KeyError) as error:
        raise _refused(method, given, first_line(error)) from None
    known = inspect.signature(type(config)).parameters.keys() - {"kwargs"}
    unknown = settings.keys() - known - {"quant_method"}
    if unknown:  # which transformers passes over without a word
        found = f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
        raise _refused(method, given, found)
    return config


def not_quantised(path: str, setting: Setting) -> CachekdError:
    """What to tell of a backend that fails while it quantises the weights."""
    given = _mapping(setting)
    return CachekdError(
        f"{_method(given)} cannot quantise the model with these settings",
        where=path,
        expected=f"such as {BACKENDS[_method(given)].example}",
        found=_shown(given),
        fix="mend the setting, or leave the quantisation out",
    )


def describe(
    setting: Setting | None, config: Any, model: PreTrainedModel, dtype: torch.dtype
) -> QuantizationInfo | None:
    """What a manifest says of how a model is quantised; None where it is not.

    Args:
        setting: None where none was given; the checkpoint may be quantised all the same.
        config: the checkpoint's.
        model: for `quantization_config`.
        dtype: of the model while it runs. It is left out where products are computed in it.
    """
    stored = in_checkpoint(config)
    if setting is None and stored is None:
        return None
    settings = stored if setting is None else quantization_config(setting, model, dtype).to_dict()
    assert settings is not None
    method = _method(settings)
    settings = {
        name: value for name, value in settings.items() if name != "quant_method" and not name.startswith("_")
    }
    if settings.get(_COMPUTES_IN) == str(dtype).removeprefix("torch."):
        del settings[_COMPUTES_IN]
    return QuantizationInfo(
        backend=method,
        version=_version(BACKENDS[method].package if method in BACKENDS else method) or "unknown",
        settings=settings,
        in_checkpoint=setting is None,
    )


def in_checkpoint(config: Any) -> dict[str, Any] | None:
    """The settings by which a checkpoint was quantised when it was saved; None where it was not."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def require_plain(config: Any, setting: Setting | None) -> None:
    """Refuse to quantise what is quantised: transformers would take no notice of the setting.

    Raises:
        CachekdError: there is a setting, and the checkpoint is quantised.
    """
    stored = in_checkpoint(config)
    if setting is not None and stored is not None:
        raise CachekdError(
            "the checkpoint is quantised already",
            where=str(config.name_or_path),
            expected="a checkpoint of plain weights",
            found=f"{_method(stored)}: {_shown(stored)}",
            fix="leave the quantisation setting out: it is loaded as it was saved",
        )


def left_whole(model: PreTrainedModel) -> list[str]:
    """The names of the modules that are never quantised: the head, which is much of a small error and next to
    nothing of the size, and the vision encoder, likewise.

    Whole names, from the model down: backends match them from the start.
    """
    kept: list[nn.Module] = [model.get_output_embeddings()]
    if family_of(model.config) is not TEXT_ONLY:
        kept.append(vision_tower(model))
    return [name for name, module in model.named_modules() if any(module is one for one in kept)]


def bits_of(setting: Setting | None) -> int | None:
    """How many bits a weight has that bitsandbytes quantises; None without it."""
    settings = {} if setting is None else _mapping(setting)
    return 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None


def stored_bytes(model: PreTrainedModel, bits: int | None = None, *, tower: bool = True) -> int:
    """What a model's weights take in memory, by its modules alone (`empty_model`); shared ones once.

    Args:
        model: whose weights have the dtype that they are loaded in.
        bits: 4 or 8: as bitsandbytes quantises the linear layers that are not in `left_whole`, with float32
            scales (4 bits: of each 64 weights; 8 bits: of each row).
        tower: False: without the vision encoder's own weights.
    """
    whole = tuple(f"{name}." for name in left_whole(model))
    sizes = {id(weight): weight.nbytes for weight in model.parameters()}
    for name, module in model.named_modules():
        if bits is not None and isinstance(module, nn.Linear) and not f"{name}.".startswith(whole):
            rows, count = len(module.weight), module.weight.numel()
            scales = count // _A_BLOCK if bits == 4 else rows
            sizes[id(module.weight)] = count * bits // 8 + scales * _SCALE
    if not tower:
        for weight in parameters_by_part(model)["vision_encoder"].values():
            del sizes[id(weight)]
    return sum(sizes.values())


def with_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """Let gradients pass through the quantised layers wherever their backend can.

    On a CPU with AVX512-BF16, bitsandbytes' 4-bit layers repack their weights in the first forward in eval
    mode, and the product with packed weights has no backward: the gradient is zero without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def backend_of(model: PreTrainedModel) -> str:
    """How a model computes, for people: what quantised it, and its attention."""
    stored = in_checkpoint(model.config)
    quantised = "no quantisation" if stored is None else f"quantised by {_method(stored)}"
    return f"{quantised}, attention {model.config._attn_implementation}, on {model.device}"


def _mapping(setting: Setting) -> Mapping[str, Any]:
    """What a preset stands for; a mapping as it is."""
    return PRESETS[setting] if isinstance(setting, str) else setting


def _method(settings: Mapping[str, Any]) -> str:
    """transformers' name of the backend; "" where none is named."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    named = settings.get("quant_method") or ""
    return str(getattr(named, "value", named))


def _torchaos(name: str) -> dict[str, Any]:
    """One of torchao's configs with its defaults, in the form that transformers asks for."""
    from torchao.core.config import config_to_dict
    from torchao.quantization import quant_api

    return config_to_dict(getattr(quant_api, name)())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _require_installed(method: str) -> None:
    package = BACKENDS[method].package
    if _version(package) is None:
        raise CachekdError(
            f"the quantisation needs a package that is not installed: {package}",
            where=f"quant_method {method}",
            fix=f"pip install {package}; or leave the quantisation out",
        )


def _refused(method: str, settings: Mapping[str, Any], found: str) -> CachekdError:
    return CachekdError(
        f"{method} has no quantisation with these settings",
        where=_shown(settings),
        expected=f"such as {BACKENDS[method].example}",
        found=found,
    )


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {getattr(value, 'value', value)}" for name, value in settings.items())
