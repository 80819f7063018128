"""Settings of evaluating on held-out data while a student trains, in the Trainer's words."""

from __future__ import annotations

from typing import Any

from cachekd.config import TrainConfig
from cachekd.defaults import SAVE_STEPS
from cachekd.errors import CachekdError

ACCURACY = "token_accuracy"  # share of answer tokens whose argmax is right
# Of the `training` mapping: these mean something where there are held-out data.
_NEEDS_EVAL_DATA = {
    "eval_strategy",
    "eval_on_start",
    "per_device_eval_batch_size",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
}


def validation_settings(config: TrainConfig, training: dict[str, Any]) -> dict[str, Any]:
    """When to evaluate, and what a better student is; by default every `eval_steps`, and by `eval_loss`.

    Args:
        training: the Trainer's own settings, which come before these.

    Raises:
        CachekdError: a setting means nothing, or the best student would not be found; it is named.
    """
    if config.eval_data is None:
        for name in _NEEDS_EVAL_DATA & training.keys():
            raise _refusal("there are no held-out data to evaluate", name, fix="--eval-data PATH")
        return {}
    settings = {
        "eval_strategy": "steps",
        "eval_steps": config.eval_steps or SAVE_STEPS,
        "per_device_eval_batch_size": config.batch_size,
        # The Trainer takes every name that does not end in "loss" for one that ought to grow.
        "greater_is_better": metric_of(config, config.eval_terms) == ACCURACY,
    }
    strategy = training.get("eval_strategy", "steps")
    if strategy not in ("steps", "epoch"):
        raise _refusal(
            "the held-out data would not be evaluated", "eval_strategy", "steps or epoch", strategy
        )
    if strategy == "epoch" and config.eval_steps is not None:
        raise _refusal("'eval_steps' would be ignored", "eval_strategy", "steps, or no eval_steps", strategy)
    if training.get("load_best_model_at_end"):
        _check_best(config, settings | training)
    return settings


def metric_of(config: TrainConfig, terms: tuple[str, ...]) -> str:
    """By which students are compared, without the Trainer's prefix.

    Args:
        terms: that are computed on the held-out data, as far as is known.

    Raises:
        CachekdError: the metric is not among what is computed.
    """
    said = config.training.get("metric_for_best_model") or "loss"
    metric = str(said).removeprefix("eval_")
    computed = ("loss", *terms, ACCURACY)
    if metric not in computed:
        fix = None
        if metric in config.terms:
            fix = "--eval-cache, the teacher's cache of eval_data"
            if config.eval_is_taught:
                fix = "eval_data with pictures: none of these has one"
        raise _refusal(
            "this is not computed on the held-out data",
            "metric_for_best_model",
            "one of " + ", ".join(f"eval_{name}" for name in computed),
            said,
            fix,
        )
    return metric


def _check_best(config: TrainConfig, settings: dict[str, Any]) -> None:
    """The best student is loaded from its checkpoint."""
    best = "load_best_model_at_end"
    if not config.save_steps and "save_strategy" not in settings:
        raise _refusal(
            "the best student is loaded from its checkpoint, and none is saved", best, found="save_steps 0"
        )
    by_steps = {settings["eval_strategy"], settings.get("save_strategy", "steps")} == {"steps"}
    if by_steps and config.save_steps % settings["eval_steps"]:
        raise _refusal(
            "checkpoints would be saved where nothing is evaluated",
            best,
            "save_steps that is a multiple of eval_steps",
            f"save_steps {config.save_steps}, eval_steps {settings['eval_steps']}",
        )
    if settings.get("save_total_limit") == 1:
        raise _refusal(
            "the best checkpoint would be the only one, with none to go on from after it",
            "save_total_limit",
            "at least 2 beside load_best_model_at_end",
            1,
        )


def _refusal(
    problem: str, name: str, expected: object = None, found: object = None, fix: str | None = None
) -> CachekdError:
    return CachekdError(problem, where=f"setting 'training.{name}'", expected=expected, found=found, fix=fix)
