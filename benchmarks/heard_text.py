"""What a language model says on held-out answers: in its own tokens, and of the next byte.

Figures in tokens compare students of one tokenizer. The next byte is neutral: wherever a token ends, any
tokenizer's probabilities add up to those of the byte that comes next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cachekd.data import collate, open_samples, predicting_positions
from cachekd.models import ModelFiles
from cachekd.vocabulary import TokenBytes

END, OTHER = 256, 257  # the next "byte" where the answer ends, and of tokens that stand for no text


@dataclass
class Heard:
    """Over all answers.

    Attributes:
        nll: nats, of the answers' tokens but those that end them.
        length: of the answers, in bytes.
        tokens: with those that end them.
        right: tokens that were the likeliest.
        next_byte: of each answer, by the place in it: [258] float32 logprobs of the byte that comes next.
        truth: of each answer, its bytes.
    """

    nll: float = 0.0
    length: int = 0
    tokens: int = 0
    right: int = 0
    next_byte: list[dict[int, Tensor]] = field(default_factory=list)
    truth: list[bytes] = field(default_factory=list)


@torch.inference_mode()
def hear(model_path: Path, data: Path) -> Heard:
    """Ask a model about every answer of a file, each a conversation of one question."""
    files = ModelFiles(model_path)
    encoder, tokens = files.encoder, files.token_bytes
    model = files.load(dtype=torch.float32, device=torch.device("cpu"))
    found = Heard()
    samples = open_samples(str(data))
    for index in range(len(samples)):
        encoded = encoder(samples[index])
        inputs = collate([encoded], encoder.pad_token_id)
        positions = predicting_positions(inputs.pop("supervised"))[0]
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[0, positions]
        logits = model.get_output_embeddings()(hidden)
        logprobs = logits.float().log_softmax(-1)
        ids = encoded.token_ids
        said = logprobs.gather(1, ids[:, None])[:, 0]
        is_end = torch.tensor([token == tokens.end_of_turn for token in ids.tolist()])
        parts = [b"" if end else tokens.contents[token] for token, end in zip(ids, is_end, strict=True)]
        text = b"".join(parts)
        found.nll -= float(said[~is_end].sum())
        found.length += len(text.strip())
        found.tokens += len(ids)
        found.right += int((logprobs.argmax(-1) == ids).sum())
        found.truth.append(text.strip())
        rows = by_next_byte(logprobs, tokens)
        place, places = len(text.lstrip()) - len(text), {}
        for row, part in zip(rows, parts, strict=True):
            places[place] = row
            place += len(part)
        found.next_byte.append({place: row for place, row in places.items() if place >= 0})
    return found


def by_next_byte(logprobs: Tensor, tokens: TokenBytes) -> Tensor:
    """[N, 258] float32 logprobs of the next byte, of [N, V] logprobs of tokens."""
    firsts = torch.full((logprobs.shape[1],), OTHER)
    for token, content in enumerate(tokens.contents[: len(firsts)]):
        if token == tokens.end_of_turn:
            firsts[token] = END
        elif content and token not in tokens.special:
            firsts[token] = content[0]
    sums = torch.zeros(len(logprobs), OTHER + 1).index_add_(1, firsts, logprobs.exp())
    return sums.clamp(min=1e-30).log()


def next_byte_kl(teacher: Heard, student: Heard) -> dict[str, float]:
    """Over the places where a token ends for both: KL(teacher || student) of the next byte in nats, and how
    often the student's likeliest next byte is the true one."""
    total, right, count = 0.0, 0, 0
    for theirs, ours, truth in zip(teacher.next_byte, student.next_byte, student.truth, strict=True):
        for place in sorted(theirs.keys() & ours.keys()):
            p, q = theirs[place], ours[place]
            total += float((p.exp() * (p - q)).sum())
            right += int(q.argmax()) == (truth[place] if place < len(truth) else END)
            count += 1
    return {"next_byte_kl": total / count, "next_byte_top1": right / count}
