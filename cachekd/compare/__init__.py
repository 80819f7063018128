"""Which variant of a pipeline is better, and how sure that is."""

from cachekd.compare.pages import write_comparison
from cachekd.compare.points import Gathered, gather
from cachekd.compare.results import Comparison
from cachekd.compare.tables import compare

__all__ = ["Comparison", "Gathered", "compare", "gather", "write_comparison"]
