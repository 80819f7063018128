"""Stage one: run the teacher once, keep its sparse logits at the answer tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachekd.cache import (
    CodecSettings,
    DataInfo,
    Fidelity,
    Fingerprints,
    LogitCacheWriter,
    OutputHead,
    TailSetting,
    TailStates,
    TeacherInfo,
    TokenTargets,
    select_topk,
)
from cachekd.cache.select import default_top_p
from cachekd.config import DumpConfig, require_new_folder
from cachekd.fingerprint import (
    image_processor_fingerprint,
    library_versions,
    template_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from cachekd.samples import Encoded, SampleEncoder, Samples, collate, open_samples, predicting_positions
from cachekd.samples.open import keys_hash
from cachekd.vlm import (
    default_device,
    default_dtype,
    hidden_and_logits_at,
    load_config,
    load_model,
    load_processor,
    output_head,
    weights_files,
)

# Samples are sorted by length within this many batches: enough that padding is rare, few enough for memory.
BATCHES_PER_SORT = 16

Progress = Callable[[int, int], None]  # samples and answer tokens done since the last call


@dataclass(frozen=True)
class DumpSummary:
    """What a dump did.

    Attributes:
        samples, tokens: how many; tokens are answer tokens.
        bytes: of the shards on disk; the tail sketch's own file is apart.
        sketch_bytes: of that file.
        fidelity: the cache against the live teacher at a sample of the tokens; None without a sketch.
        mean_k: logprobs kept per token.
        seconds: wall time of the teacher's pass.
    """

    out: Path
    samples: int
    tokens: int
    bytes: int
    sketch_bytes: int
    fidelity: Fidelity | None
    mean_k: float
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


def dump(config: DumpConfig, progress: Progress = lambda samples, tokens: None) -> DumpSummary:
    """Cache a teacher's logits over a data set.

    Raises:
        CachekdError: bad input; nothing is left behind at `config.out`.
    """
    require_new_folder(config.out, "cache")
    TailSetting.parse(config.tail)  # refuse an unknown one before anything is loaded
    samples = open_samples(config.data)
    device = default_device()
    dtype = default_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    load_config(config.teacher)  # refuse an unknown family before anything is loaded
    processor = load_processor(config.teacher)
    encoder = SampleEncoder(processor)
    encoder(samples[0])  # refuse an unusable template or data set before the teacher is loaded
    teacher = load_model(config.teacher, dtype=dtype, device=device)

    about = describe(config, teacher, processor, encoder, samples)
    head = _head_of(teacher, processor, encoder(samples[0])) if about["codec"].tail != "none" else None

    started = time.perf_counter()
    with LogitCacheWriter(
        config.out, **about, head=head, calibration_tokens=config.calibration_tokens
    ) as writer:
        for group in _groups(samples, encoder, config.batch_size):
            for encoded, targets, states in _targets_of(
                group, teacher, processor, about["codec"], config.batch_size
            ):
                writer.add(encoded.key, targets, encoded.content_hash, states)
                progress(1, len(targets))
    seconds = time.perf_counter() - started

    manifest = writer.manifest
    return DumpSummary(
        out=config.out,
        samples=manifest.samples,
        tokens=manifest.tokens,
        bytes=manifest.size,
        sketch_bytes=manifest.sketch.bytes if manifest.sketch else 0,
        fidelity=manifest.fidelity,
        mean_k=manifest.entries / manifest.tokens,
        seconds=seconds,
    )


def describe(
    config: DumpConfig, teacher: PreTrainedModel, processor: Any, encoder: SampleEncoder, samples: Samples
) -> dict[str, Any]:
    """Everything the manifest says about where the logits come from."""
    files = weights_files(config.teacher)
    commit = getattr(teacher.config, "_commit_hash", None)
    return {
        "teacher": TeacherInfo(
            name=config.teacher,
            model_type=teacher.config.model_type,
            dtype=str(teacher.dtype).removeprefix("torch."),
            vocab_size=vocabulary_size(teacher, processor),
            weights_sha256=weights_fingerprint(files) if files else f"hub:{commit}",
        ),
        "fingerprints": Fingerprints(
            tokenizer=tokenizer_fingerprint(processor.tokenizer),
            chat_template=template_fingerprint(encoder.template),
            image_processor=image_processor_fingerprint(processor),
            image_token=str(processor.image_token),
        ),
        "data": DataInfo(path=str(config.data), samples=len(samples), sha256=keys_hash(samples)),
        "codec": CodecSettings(
            top_k=config.top_k,
            top_p=default_top_p(TailSetting.parse(config.tail)) if config.top_p is None else config.top_p,
            window=config.window,
            min_k=config.min_k,
            tail=config.tail,
        ),
        "versions": library_versions(),
    }


def vocabulary_size(model: PreTrainedModel, processor: Any) -> int:
    """Tokens that the tokenizer can name; rows that pad the embedding beyond them mean nothing."""
    return min(len(processor.tokenizer), model.get_output_embeddings().weight.shape[0])


def _groups(samples: Samples, encoder: SampleEncoder, batch_size: int) -> Iterator[list[Encoded]]:
    size = batch_size * BATCHES_PER_SORT
    for start in range(0, len(samples), size):
        yield [encoder(samples[i]) for i in range(start, min(start + size, len(samples)))]


@torch.inference_mode()
def _targets_of(
    group: list[Encoded], teacher: PreTrainedModel, processor: Any, codec: CodecSettings, batch_size: int
) -> Iterator[tuple[Encoded, TokenTargets, TailStates]]:
    """The teacher's targets of each sample, in the group's order; batched by length."""
    by_length = sorted(range(len(group)), key=lambda i: len(group[i]))
    vocabulary = vocabulary_size(teacher, processor)
    found: dict[int, tuple[TokenTargets, TailStates]] = {}
    for start in range(0, len(group), batch_size):
        chosen = by_length[start : start + batch_size]
        hidden, logits, token_ids, counts = _run([group[i] for i in chosen], teacher, processor)
        targets = select_topk(
            logits[:, :vocabulary],
            token_ids,
            top_k=codec.top_k,
            top_p=codec.top_p,
            window=codec.window,
            min_k=codec.min_k,
        )
        normaliser = logits[:, :vocabulary].float().logsumexp(-1)
        states = map(TailStates, hidden.split(counts), normaliser.split(counts))
        found |= zip(chosen, zip(targets.split(counts), states, strict=True), strict=True)
    return ((group[i], *found[i]) for i in range(len(group)))


def _run(
    chosen: list[Encoded], teacher: PreTrainedModel, processor: Any
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Hidden states [N, d], logits [N, V] and ids [N] at a batch's answer tokens, and how many each has."""
    batch = collate(chosen, processor.tokenizer.pad_token_id)
    batch = {name: value.to(teacher.device) for name, value in batch.items()}
    supervised = batch.pop("supervised")
    hidden, logits = hidden_and_logits_at(teacher, batch, predicting_positions(supervised))
    return hidden, logits, batch["input_ids"][supervised], supervised.sum(1).tolist()


@torch.inference_mode()
def _head_of(teacher: PreTrainedModel, processor: Any, first: Encoded) -> OutputHead:
    hidden, logits, _, _ = _run([first], teacher, processor)
    return output_head(teacher, hidden, logits, vocabulary_size(teacher, processor))
