"""Universal Logit Distillation (Boizard et al. 2024, arXiv 2402.12030), as a baseline.

Two distributions over different vocabularies are compared by their probabilities alone, each side's in
descending order: the sum of |p_(r) - q_(r)| over the ranks r, which is the cost of optimal transport where
any two tokens are equally far apart. The i-th answer tokens of both sides are compared, up to the end of the
shorter answer. The weight beside L_CE is theirs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from cachekd.cache import LogitCache
from cachekd.config import TrainConfig
from cachekd.losses import cross_entropy_loss
from cachekd.models import ModelFiles, save_processor
from cachekd.paths import RUN_FILE
from cachekd.train.open import make_trainer
from cachekd.train.student import save_merged

WEIGHT = 1.5
RANKS = 1024  # what follows has next to no mass, and its gradient is as small


def uld_loss(student_logits: Tensor, teacher_sorted: Tensor) -> Tensor:
    """The sum over n answer tokens.

    Args:
        student_logits: [n, V_S].
        teacher_sorted: [n, R] float, the teacher's probabilities in descending order.
    """
    ranks = min(student_logits.shape[1], teacher_sorted.shape[1])
    ours = student_logits.float().softmax(-1).topk(ranks).values
    return (ours - teacher_sorted[:, :ranks]).abs().sum()


def sorted_probabilities(cache: LogitCache, key: str) -> Tensor:
    """[N_T, RANKS] of a sample of the cache, a few tokens at a time."""
    targets = cache[key]
    parts = torch.arange(len(targets)).split(16)
    return torch.cat(
        [
            found.topk(min(RANKS, found.shape[1])).values
            for part in parts
            if (found := targets.select(part).everywhere().softmax(-1)) is not None
        ]
    )


def train_uld(config: TrainConfig, cache_folder: Path, *, weight: float = WEIGHT) -> None:
    """Train adapters by L_CE + `weight` ULD: the adapters' beginning, the data's order, the optimizer and its
    schedule are those of a run of `cachekd train` with this configuration.

    Args:
        config: of a run by L_CE alone, with `lora`.
    """
    out = config.out
    trainer = make_trainer(config, out / "checkpoints")
    cache, known = LogitCache(cache_folder), {}
    loader = trainer.get_train_dataloader()
    epochs = int(config.epochs)
    trainer.create_optimizer_and_scheduler(epochs * len(loader))
    model, optimizer, schedule = trainer.model, trainer.optimizer, trainer.lr_scheduler
    assert optimizer is not None
    assert schedule is not None
    model.train()
    started, losses = time.perf_counter(), []
    for epoch in range(epochs):
        trainer.state.epoch = epoch
        for batch in loader:
            positions, answers = batch.student.positions, batch.student.supervised
            with trainer.compute_loss_context_manager():
                logits = model(**batch.student.tensors, use_cache=False).logits
            ce = cross_entropy_loss(logits[positions], batch.student.token_ids, reduction="sum")
            uld, pairs = torch.zeros(()), 0
            for key, row, is_predicting in zip(batch.keys if weight else [], logits, positions, strict=False):
                if key not in known:
                    known[key] = sorted_probabilities(cache, key)
                ours = row[is_predicting]
                n = min(len(ours), len(known[key]))
                uld, pairs = uld + uld_loss(ours[:n], known[key][:n]), pairs + n
            loss = ce / answers.sum() + weight * uld / max(1, pairs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append([float(ce.detach() / answers.sum()), float(uld.detach()) / max(1, pairs)])
    seconds = time.perf_counter() - started
    model.save_pretrained(out / "adapter")
    files = ModelFiles(config.student)
    save_merged(files, out / "adapter", out)
    save_processor(files.encoder, out)
    cost = {"steps": len(losses), "seconds": seconds}
    (out / RUN_FILE).write_text(json.dumps({"cost": cost, "losses": losses}))
