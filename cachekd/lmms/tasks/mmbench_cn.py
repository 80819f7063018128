"""How MMBench's Chinese questions are scored without a judge."""

from __future__ import annotations

from typing import Any


def accuracy(results: list[dict[str, Any]]) -> float:
    """The percentage of questions that are answered rightly whatever the order of their options."""
    from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator

    overall, _, _ = mmbench_evaluator.eval_result(results, eval_method="static")
    return 100 * float(overall)
