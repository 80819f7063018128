"""The cache on disk: manifest, shards, codec, writer, reader. Knows nothing of models or transformers."""

from cachekd.cache.manifest import (
    CodecSettings,
    Fidelity,
    Fingerprints,
    Manifest,
    TeacherInfo,
)
from cachekd.cache.plan import DumpPlan, DumpSource
from cachekd.cache.reader import LogitCache
from cachekd.cache.roundtrip import roundtrip
from cachekd.cache.source import DataInfo, Geometry
from cachekd.cache.sparse_logits import TailStates, TokenTargets
from cachekd.cache.tail.encoder import OutputHead
from cachekd.cache.tail.setting import TailSetting
from cachekd.cache.tail.sketch import SketchTail, TailSketch
from cachekd.cache.targets import CachedTargets, UniformTail
from cachekd.cache.topk import select_topk
from cachekd.cache.verify import Finding, verify_files
from cachekd.cache.writer import LogitCacheWriter

__all__ = [
    "CachedTargets",
    "CodecSettings",
    "DataInfo",
    "DumpPlan",
    "DumpSource",
    "Fidelity",
    "Finding",
    "Fingerprints",
    "Geometry",
    "LogitCache",
    "LogitCacheWriter",
    "Manifest",
    "OutputHead",
    "SketchTail",
    "TailSetting",
    "TailSketch",
    "TailStates",
    "TeacherInfo",
    "TokenTargets",
    "UniformTail",
    "roundtrip",
    "select_topk",
    "verify_files",
]
