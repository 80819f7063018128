"""Try the codec on a model's own states, in three lines."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachekd.cache.manifest import CodecSettings, Fingerprints, TeacherInfo
from cachekd.cache.reader import LogitCache
from cachekd.cache.source import DataInfo
from cachekd.cache.sparse_logits import TailStates, TokenTargets
from cachekd.cache.tail.encoder import OutputHead, SketchEncoder
from cachekd.cache.tail.fit import fit_sketch
from cachekd.cache.tail.setting import TailSetting
from cachekd.cache.tail.sketch import SketchTail
from cachekd.cache.targets import CachedTargets
from cachekd.cache.topk import default_top_p, select_and_normalise
from cachekd.cache.writer import LogitCacheWriter
from cachekd.config.fields import DEFAULT_TAIL

ROWS = 256  # tokens whose whole logits are in memory


@torch.no_grad()
def roundtrip(
    hidden: Tensor,
    lm_head: Tensor | OutputHead,
    token_ids: Tensor,
    *,
    top_k: int = 128,
    tail: str = DEFAULT_TAIL,
    calibration: Tensor | None = None,
    top_p: float | None = None,
    window: int = 128,
    logprob_step: float | None = None,
) -> tuple[CachedTargets, int]:
    """Write a temporary cache and read it back.

    Args:
        hidden: [N, d] float, final hidden states, as the head reads them.
        lm_head: [V, d] float, or an `OutputHead`.
        token_ids: [N] int, the answer tokens.
        top_k, tail, top_p, window, logprob_step: as for `cachekd dump`.
        calibration: [n, d] float, states that the tail sketch is fitted on; without them the first 16,384 of
            `hidden`, as in a dump.

    Returns:
        the targets, and the bytes of their shards on disk. The sketch's own file is apart from that:
        `len(targets.tail.sketch.pack())`.

    Raises:
        CachekdError: shapes that do not match, or states that are not finite.
    """
    head = lm_head if isinstance(lm_head, OutputHead) else OutputHead(lm_head)
    setting = TailSetting.parse(tail)
    codec = CodecSettings(
        top_k=top_k,
        top_p=default_top_p(setting) if top_p is None else top_p,
        window=window,
        min_k=2,
        logprob_step=setting.logprob_step if logprob_step is None else logprob_step,
        tail=tail,
    )
    encoder = None
    if setting.sketch and calibration is not None:
        encoder = fit_states(head, calibration, codec)
    states, targets = select_states(head, hidden, token_ids, codec)
    with tempfile.TemporaryDirectory() as folder:
        with LogitCacheWriter(
            Path(folder) / "cache", **states_header(codec, len(head.weight)), head=head, encoder=encoder
        ) as writer:
            writer.add("states", targets, bytes(16), states)
        read = LogitCache(writer.path)["states"]
    if isinstance(read.tail, SketchTail):  # its file is gone by now
        read = replace(
            read, tail=replace(read.tail, sketch=replace(read.tail.sketch, path=None, sha256=None))
        )
    return read, writer.manifest.size


def fit_states(head: OutputHead, calibration: Tensor, codec: CodecSettings) -> SketchEncoder:
    """The sketch that `codec.tail` asks for, fitted on [n, d] states alone."""
    unknown = torch.zeros(len(calibration), dtype=torch.long)
    return fit_sketch(head, *select_states(head, calibration, unknown, codec), TailSetting.parse(codec.tail))


def states_header(codec: CodecSettings, vocab_size: int) -> dict[str, Any]:
    """What a `LogitCacheWriter` wants to know, for states of which nothing is known."""
    nothing = dict.fromkeys(("tokenizer", "chat_template", "image_processor", "image_token"), "")
    return {
        "teacher": TeacherInfo(
            name="", model_type="", dtype="", vocab_size=vocab_size, weights_sha256="", config_sha256=""
        ),
        "fingerprints": Fingerprints(**nothing),
        "data": DataInfo(path="", samples=1, sha256=""),
        "codec": codec,
        "versions": {},
    }


def select_states(
    head: OutputHead, hidden: Tensor, token_ids: Tensor, codec: CodecSettings
) -> tuple[TailStates, TokenTargets]:
    """What a dump would pass on for the sketch of these states, and what it would keep."""
    parts, normalisers = [], []
    for some, ids in zip(hidden.split(ROWS), token_ids.split(ROWS), strict=True):
        part, normaliser = select_and_normalise(
            head.logits(some),
            ids,
            top_k=codec.top_k,
            top_p=codec.top_p,
            window=codec.window,
            min_k=codec.min_k,
        )
        parts.append(part)
        normalisers.append(normaliser)
    return TailStates(hidden, torch.cat(normalisers)), TokenTargets.concatenate(parts)
