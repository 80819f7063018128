"""How good is a student: exact match, agreement with the teacher, and what both are worth.

`cachekd.evaluate.run.evaluate` finds it out. What is here keeps, reads and compares it, and needs no model.
"""

from cachekd.evaluate.scores import CellCoverage, Difference, Evaluation, QuestionSet, Score, differences
from cachekd.evaluate.scores_file import (
    only_writer,
    read_scores,
    require_kept_scores,
    save_in_runs,
    save_scores,
)

__all__ = [
    "CellCoverage",
    "Difference",
    "Evaluation",
    "QuestionSet",
    "Score",
    "differences",
    "only_writer",
    "read_scores",
    "require_kept_scores",
    "save_in_runs",
    "save_scores",
]
