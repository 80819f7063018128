"""The cache on disk: manifest, shards, codec, writer, reader. Knows nothing of models or transformers."""

from cachekd.cache.manifest import (
    CodecSettings,
    DataInfo,
    Fingerprints,
    Manifest,
    ShardInfo,
    TeacherInfo,
)
from cachekd.cache.reader import LogitCache
from cachekd.cache.records import TokenTargets
from cachekd.cache.select import select_topk
from cachekd.cache.targets import CachedTargets, UniformTail
from cachekd.cache.writer import LogitCacheWriter

__all__ = [
    "CachedTargets",
    "CodecSettings",
    "DataInfo",
    "Fingerprints",
    "LogitCache",
    "LogitCacheWriter",
    "Manifest",
    "ShardInfo",
    "TeacherInfo",
    "TokenTargets",
    "UniformTail",
    "select_topk",
]
