"""The benchmarks of the Switch-KD paper, with its figures for 0.5B students."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from cachekd.config.evaluate import Suite
from cachekd.lmms.scores import ModelScores

METHODS = ("TinyLLaVA", "LLaVA-KD", "Switch-KD")  # the columns of `Line.published`


@dataclass(frozen=True)
class Line:
    """A benchmark of the paper.

    Attributes:
        label: as the paper calls it.
        task: of lmms-eval.
        metric: of the task.
        scale: from the metric to the paper's percentages.
        published: of `METHODS`, percentages.
    """

    label: str
    task: str
    metric: str
    scale: float
    published: tuple[float, float, float]

    def score(self, model: ModelScores) -> float | None:
        """A model's percentage; None where it was not asked."""
        found = model.on(self.task)
        metric = None if found is None else found.metric(self.metric)
        return None if metric is None else self.scale * metric.value


# The figures: the authors' README (github.com/haoyi199815/Switch-KD, c20f6ef), "Results on 10 Multimodal
# Benchmarks, 0.5B models". MME is its perception score over 2,000, which their average of six benchmarks with
# MME^P = 1411.5 confirms. Which of POPE's metrics theirs is, and which splits were asked, they do not say:
# LLaVA's scripts report F1, and ask VQAv2 test-dev and VizWiz test, whose answers are not public.
SUITES: dict[Suite, tuple[Line, ...]] = {
    "switch-kd": (
        Line("MME", "mme", "mme_perception_score", 1 / 20, (61.5, 64.7, 66.8)),
        Line("MMB", "mmbench_en_dev_static", "gpt_eval_score", 1, (58.9, 61.3, 63.5)),
        Line("MMB-CN", "mmbench_cn_dev_static", "gpt_eval_score", 1, (54.2, 57.0, 57.8)),
        Line("VQAv2", "vqav2_val", "exact_match", 100, (74.8, 77.7, 79.6)),
        Line("GQA", "gqa", "exact_match", 100, (58.3, 59.8, 61.6)),
        Line("SciQA", "scienceqa_img", "exact_match", 100, (59.1, 60.6, 57.9)),
        Line("MMMU", "mmmu_val", "mmmu_acc", 100, (33.6, 28.3, 29.8)),
        Line("TextVQA", "textvqa_val", "exact_match", 100, (49.2, 52.0, 52.3)),
        Line("VizWiz", "vizwiz_vqa_val", "exact_match", 100, (28.9, 41.5, 44.9)),
        Line("POPE", "pope", "pope_f1_score", 100, (86.1, 86.4, 87.3)),
    )
}
AVERAGES = {"switch-kd": (56.5, 58.9, 60.1)}  # as published


def tasks_of(suite: Suite | None) -> tuple[str, ...]:
    """The tasks of a suite, by lmms-eval's names."""
    return () if suite is None else tuple(line.task for line in SUITES[suite])


def average(suite: Suite, model: ModelScores) -> float | None:
    """A model's mean percentage; None unless it was asked all benchmarks of the suite."""
    scores = [line.score(model) for line in SUITES[suite]]
    known = [score for score in scores if score is not None]
    return fmean(known) if len(known) == len(scores) else None
