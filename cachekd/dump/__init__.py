"""Stage one: the teacher runs once, and its logits become shards."""

from cachekd.dump.run import DumpSummary, dump, estimate_dump

__all__ = [
    "DumpSummary",
    "dump",
    "estimate_dump",
]
