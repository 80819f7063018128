"""Stage two: the student trains against the cache."""

from cachekd.train.arguments import SwitchKDTrainingArguments
from cachekd.train.data import TrainingSamples
from cachekd.train.run import TrainSummary, train
from cachekd.train.trainer import SwitchKDTrainer

__all__ = [
    "SwitchKDTrainer",
    "SwitchKDTrainingArguments",
    "TrainSummary",
    "TrainingSamples",
    "train",
]
