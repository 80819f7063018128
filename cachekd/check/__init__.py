"""Do a teacher, a student and a data set fit together? Asked before anything long starts."""

from cachekd.check.data_rows import Lengths
from cachekd.check.memory import StepMemory, StepSetting, step_memory
from cachekd.check.pair import PairReport, Run, check_pair, preview
from cachekd.check.rows import Row
from cachekd.check.sizes import Sizes, StepSizes, sizes_of

__all__ = [
    "Lengths",
    "PairReport",
    "Row",
    "Run",
    "Sizes",
    "StepMemory",
    "StepSetting",
    "StepSizes",
    "check_pair",
    "preview",
    "sizes_of",
    "step_memory",
]
