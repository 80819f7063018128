"""Load VLMs and language models, with messages for people where transformers raises its own."""

from __future__ import annotations

import copy
import struct
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypedDict, Unpack

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from cachekd.errors import CachekdError, first_line
from cachekd.models.attention import require_attention
from cachekd.models.device_map import cannot_lie_there, placed, quantised_elsewhere, unpacked_as_a_whole
from cachekd.models.families import TEXT_ONLY, family_of, vision_tower_name
from cachekd.models.memory import memory_that_ran_out
from cachekd.models.placement import is_offloaded, quietly, settle
from cachekd.models.quantization import (
    Setting,
    in_checkpoint,
    not_quantised,
    quantization_config,
    require_plain,
    with_gradients,
)
from cachekd.models.tinyllava import is_tinyllava
from cachekd.models.weights import forget_gguf, gguf_config, is_gguf, source, unpacked, weights_files
from cachekd.paths import require_path

_FORMS = (
    "a folder in Hugging Face format (config.json, model.safetensors), a name on the hub (org/name, where no "
    "folder org is here), or a .gguf file of a language model"
)


class LoadSettings(TypedDict, total=False):
    """How a model's weights come into memory, besides dtype and device; what is not said is as usual.

    Attributes:
        quantization: a preset, or the settings of a backend: see `quantization_config`.
        device_map: where its layers lie: "auto", or a file; see `cachekd.models.device_map`.
        max_memory: bytes by device ("0", "cpu"), for "auto".
        attn_implementation: see `require_attention`.
    """

    quantization: Setting | None
    device_map: str | None
    max_memory: dict[str, int] | None
    attn_implementation: str | None


def keep_statistics(model: nn.Module) -> None:
    """Let batch norms (FastVLM's encoder has them) use the checkpoint's statistics in training too.

    Else a sample's features would depend on its neighbours in the batch, the gradient on how a step is
    accumulated, and what is saved would give other features than what was trained.
    """

    def settle(module: nn.Module, _args: Any) -> None:
        module.training = False

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(settle)


def load_config(path: str) -> Any:
    """A supported VLM's configuration.

    Raises:
        CachekdError: there is no model at `path`, its family is not supported, or an adapter is there.
    """
    require_path(path, "model", _FORMS)
    try:
        # Never a checkpoint's own code, nor a question whether to run it.
        config = (
            gguf_config(path) if is_gguf(path) else AutoConfig.from_pretrained(path, trust_remote_code=False)
        )
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, struct.error) as error:
        reached = "couldn't connect" not in str(error)  # else each question takes half a minute more
        if reached:
            _refuse_adapter(path)
        if reached and is_tinyllava(path):
            raise CachekdError(
                "this checkpoint is in TinyLLaVA Factory's layout",
                where=str(path),
                expected="a model of transformers' own",
                fix=f"cachekd convert {path} -o NEW_FOLDER, and use that (download it first from a hub)",
            ) from None
        raise CachekdError(
            "no model can be loaded",
            where=str(path),
            expected=_FORMS,
            found=first_line(error),
            fix="pip install 'cachekd[gguf]'" if is_gguf(path) and isinstance(error, ImportError) else None,
        ) from None
    _refuse_adapter(path)
    config.name_or_path = str(path)
    family_of(config)
    return config


def _refuse_adapter(path: str) -> None:
    """transformers applies one that it finds beside a model, but only where peft is installed."""
    folder = source(path)[0]
    if not (Path(folder, ADAPTER_CONFIG_NAME).is_file() if Path(folder).is_dir() else _hub_adapter(folder)):
        return
    raise CachekdError(
        "an adapter is not a whole model: merge it first",
        where=str(path),
        expected="a model without adapters",
        found=ADAPTER_CONFIG_NAME,
        fix="with peft: PeftModel.from_pretrained(BASE_MODEL, ADAPTER).merge_and_unload()"
        ".save_pretrained(NEW_FOLDER), and save the processor there too",
    )


@cache
def _hub_adapter(name: str) -> bool:
    """Whether a name on the hub has an adapter; asked once, and no where the hub cannot be reached."""
    try:
        return find_adapter_config_file(name) is not None
    except OSError:  # no such name, or none that a hub could have
        return False


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tower: bool = True,
    config: Any = None,
    **settings: Unpack[LoadSettings],
) -> PreTrainedModel:
    """A VLM (or, of the family `text_only`, language model) in eval mode.

    Args:
        tower: False: P, L and the head alone, frozen; the vision encoder's weights are never read.
        config: of `load_config`, where it was read before; it stays as it is.
        settings: see `LoadSettings`.

    Raises:
        CachekdError: there is no such model, its family is not supported, its checkpoint lacks weights, they
            cannot be read, a package is missing; or as `require_attention`.
    """
    config = load_config(path) if config is None else config
    require_attention(auto_class(config), config, settings.get("attn_implementation"))
    model_class = auto_class(config) if tower else _without_tower(config)
    model = _load(model_class, path, config, dtype, device, **settings)
    return model if tower else model.requires_grad_(False)


def empty_model(config: Any, model_class: Any = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The modules of a model without memory or weights ("meta"), from its config alone."""
    model_class = auto_class(config) if model_class is None else model_class
    make = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        model: PreTrainedModel = make(copy.deepcopy(config), **({} if dtype is None else {"dtype": dtype}))
    return model


def auto_class(config: Any) -> Any:
    """transformers' class that makes such a model."""
    return AutoModelForCausalLM if family_of(config) is TEXT_ONLY else AutoModelForImageTextToText


def _without_tower(config: Any) -> Any:
    """The class of a VLM, but for its vision encoder: the checkpoint's weights of it are passed over."""
    name, kept = vision_tower_name(config), family_of(config).inside
    whole: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]

    class Towerless(whole):
        _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
            rf"(^|\.){name}\.(?!({'|'.join(kept)})\.)" if kept else rf"(^|\.){name}\."
        ]

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            _empty_tower(getattr(self.model, name), kept)

    # transformers renames a checkpoint's weights only for classes that it knows as its own.
    Towerless.__name__, Towerless.__module__ = whole.__name__, whole.__module__
    return Towerless


def _empty_tower(tower: nn.Module, kept: tuple[str, ...]) -> None:
    """Take a vision encoder's modules away, in place, all but the projector's."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("this teacher was loaded without its vision encoder: call it with image features")

    for name in set(tower._modules) - set(kept):
        delattr(tower, name)
    for name in list(tower._parameters):
        delattr(tower, name)
    tower.forward = refuse


def _load(
    model_class: Any,
    path: str,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Setting | None = None,
    device_map: str | None = None,
    max_memory: dict[str, int] | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    settings: dict[str, Any] = {}
    require_plain(config, quantization)
    quantised = quantization is not None or in_checkpoint(config) is not None
    if quantised:  # a quantised model cannot be moved later
        settings["device_map"] = {"": device}
    if quantization is not None:
        settings["quantization_config"] = quantization_config(quantization, empty_model(config), dtype)
    config = copy.deepcopy(config)  # it becomes the model's, which may be trained and saved
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    if is_gguf(path):
        if device_map is not None:
            raise unpacked_as_a_whole(path)
        return _load_gguf(model_class, path, config, dtype, quantization).to(device).eval()
    if device_map is not None:
        empty, whole = empty_model(config, model_class, dtype), empty_model(config)
        settings |= placed(empty, device, device_map, max_memory, whole=whole, quantised=quantised)
    weights_files(path)  # with a message of its own where a folder has none
    try:
        with quietly():
            model = _from_pretrained(model_class, path, config=config, dtype=dtype, **settings)
    except (OSError, SafetensorError, UnpicklingError, EOFError) as error:
        raise CachekdError(
            "the model's weights cannot be read",
            where=str(path),
            expected="whole files: *.safetensors or *.bin",
            found=first_line(error),
            fix="a file was cut short or changed: fetch or save the model again",
        ) from None
    except ImportError as error:
        raise CachekdError(
            "the model cannot be loaded: a package is missing",
            where=str(path),
            found=first_line(error),
            fix="pip install what is named above"
            + (", or load the model unquantised" if quantization is not None else ""),
        ) from None
    except ValueError as error:  # of a map that the weights' files or the quantisation do not go with
        if device_map is None:
            raise
        raise (
            quantised_elsewhere(path) if quantised else cannot_lie_there(path, first_line(error))
        ) from None
    except RuntimeError as error:  # transformers', whatever the backend raised
        if quantization is None or memory_that_ran_out(error) is not None:
            raise
        raise not_quantised(path, quantization) from None
    if is_offloaded(model) and quantised:
        raise quantised_elsewhere(path)
    settle(model)
    lies = quantised or device_map is not None
    return with_gradients(model if lies else model.to(device)).eval()


def _load_gguf(
    model_class: Any, path: str, config: Any, dtype: torch.dtype, quantization: Setting | None
) -> PreTrainedModel:
    if quantization is not None:
        raise CachekdError(
            "a GGUF file is quantised in its own way, and is unpacked here",
            where=path,
            fix="leave the quantisation settings out",
        )
    folder, options = source(path)
    model = _from_pretrained(model_class, folder, config=config, dtype=dtype, **options, **unpacked())
    forget_gguf(model)
    model.config.name_or_path = path
    return model


def _from_pretrained(model_class: Any, path: str, **kwargs: Any) -> PreTrainedModel:
    """Load weights, and refuse a checkpoint that leaves some of them at random values."""
    model, info = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    keep_statistics(model)
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        raise CachekdError(
            "the checkpoint does not fit its configuration, and some weights would be random",
            where=str(path),
            expected="every weight of the model",
            found=f"{len(missing)} missing or of another shape: {', '.join(missing[:3])}",
        )
    return model
