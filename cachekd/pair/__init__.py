"""Do a teacher, a student and a data set fit together? Asked before anything long starts."""

from cachekd.pair.check import PairReport, check_pair
from cachekd.pair.data_rows import Lengths
from cachekd.pair.preview import Run, preview
from cachekd.pair.rows import Row
from cachekd.pair.size import Sizes, sizes_of

__all__ = ["Lengths", "PairReport", "Row", "Run", "Sizes", "check_pair", "preview", "sizes_of"]
