"""How good is a student: exact match, agreement with the teacher, and what both are worth."""

from cachekd.evaluation.record import read_records, save_in_runs
from cachekd.evaluation.run import evaluate
from cachekd.evaluation.scores import Difference, Evaluation, QuestionSet, Score

__all__ = ["Difference", "Evaluation", "QuestionSet", "Score", "evaluate", "read_records", "save_in_runs"]
