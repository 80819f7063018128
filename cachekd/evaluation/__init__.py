"""How good is a student: exact match, agreement with the teacher, and what both are worth.

`cachekd.evaluation.run.evaluate` finds it out. What is here keeps, reads and compares it, and needs no model.
"""

from cachekd.evaluation.record import only_writer, read_records, require_records, save_in_runs, save_scores
from cachekd.evaluation.scores import Difference, Evaluation, QuestionSet, Score, differences

__all__ = [
    "Difference",
    "Evaluation",
    "QuestionSet",
    "Score",
    "differences",
    "only_writer",
    "read_records",
    "require_records",
    "save_in_runs",
    "save_scores",
]
