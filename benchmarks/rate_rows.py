"""What `rate_distortion.py` measures of a setting, as a table and as curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """One setting, measured.

    Attributes:
        basis_mb: what a reader needs once per cache, in 10**6 bytes: a tail sketch's own file, or the head.
        kl: KL(live || rebuilt), nats, the mean over the tokens.
        cosine_far, cosine_near: between DBiLD's gradients for cached and for live targets, the mean.
        cosine_far_p1, cosine_near_p1: their first percentiles.
        forward_kl_far, forward_kl_near: the same cosine of forward KL's gradients, the mean.
        loss_error_far, loss_error_near: of DBiLD, the cached loss over the live one, less 1.
        own_loss: of another tool's own KL loss on what it keeps, the same cosine against forward KL to the
            live teacher: its handling of the mass that is not kept -> student -> mean.
    """

    name: str
    bytes_per_token: float
    basis_mb: float
    encode_tokens_per_s: float
    decode_tokens_per_s: float
    kl: float = float("nan")
    cosine_far: float = float("nan")
    cosine_near: float = float("nan")
    cosine_far_p1: float = float("nan")
    cosine_near_p1: float = float("nan")
    forward_kl_far: float = float("nan")
    forward_kl_near: float = float("nan")
    loss_error_far: float = float("nan")
    loss_error_near: float = float("nan")
    own_loss: dict[str, dict[str, float]] = field(default_factory=dict)


def print_table(rows: list[Row], console: Console) -> None:
    """One line a setting; the basis apart, in megabytes."""
    columns = (
        "setting",
        "B/token",
        "basis MB",
        "KL",
        "far",
        "near",
        "far p1",
        "near p1",
        "KL far",
        "KL near",
        "loss far",
        "loss near",
    )
    table = Table(*columns, "encode/s", "decode/s")
    for row in rows:
        cosines = (row.cosine_far, row.cosine_near, row.cosine_far_p1, row.cosine_near_p1)
        table.add_row(
            row.name,
            f"{row.bytes_per_token:.1f}",
            f"{row.basis_mb:.1f}",
            f"{row.kl:.4f}",
            *(f"{value:.4f}" for value in (*cosines, row.forward_kl_far, row.forward_kl_near)),
            f"{row.loss_error_far:+.1%}",
            f"{row.loss_error_near:+.1%}",
            f"{row.encode_tokens_per_s:,.0f}",
            f"{row.decode_tokens_per_s:,.0f}",
        )
    console.print(table)
    for row in rows:
        for handling, students in row.own_loss.items():
            said = ", ".join(f"{student} {cosine:.4f}" for student, cosine in students.items())
            console.print(f"{row.name}, its own KL loss, missing probability {handling}: {said}")


def plot(rows: list[Row], path: Path) -> None:
    """1 - cosine and KL against bytes per token."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {
        "naive": ("naive top-k", "none"),
        "uniform": ("top-k, uniform tail", "-"),
        "sketch": ("top-k and tail sketch", "-"),
        "DistillKit": ("DistillKit", "none"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    values: tuple[tuple[str, Any], ...] = (
        ("1 - gradient cosine, far student", lambda row: 1 - row.cosine_far),
        ("1 - gradient cosine, near student", lambda row: 1 - row.cosine_near),
        ("KL(live || rebuilt), nats", lambda row: row.kl),
    )
    for axis, (title, value) in zip(axes, values, strict=True):
        for kind, (label, line) in kinds.items():
            chosen = sorted((r for r in rows if r.name.startswith(kind)), key=lambda r: r.bytes_per_token)
            if chosen:
                axis.plot(
                    [r.bytes_per_token for r in chosen],
                    [value(r) for r in chosen],
                    marker="o",
                    ls=line,
                    label=label,
                )
        axis.set(xscale="log", yscale="log", xlabel="bytes per answer token", title=title)
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
