"""DistillKit's own codec, for `rate_distortion.py --distillkit DIR`, where DIR is a checkout of DistillKit.

Nothing of it is installed: its codec needs torch and pydantic alone, and is imported from DIR. The presets
are the two that its README names. Its arrays are measured as they are, in one file; the Parquet that its
capture puts around them is not.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachekd.cache import CachedTargets, OutputHead, TokenTargets
from cachekd.cache.fidelity import gradient_cosine

from smollm2 import States  # isort: skip

BOTH: dict[str, Any] = {
    "exact_dtype": "bfloat16",
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}
RECOMMENDED = {**BOTH, "k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]}
BUDGET = {**BOTH, "k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}
# Its polynomial is fitted in the precision of what it is given. Its capture gives float32. In that the fit of
# the recommended preset (terms from 1 to t**4, t up to 111) loses all digits with some builds of LAPACK, as
# the singular values span nine decades. So both are measured.
PRESETS = {
    "DistillKit recommended": (RECOMMENDED, torch.float32),
    "DistillKit recommended, fitted in float64": (RECOMMENDED, torch.float64),
    "DistillKit budget": (BUDGET, torch.float32),
}
BLOCK = 224  # tokens at a time, as one sample would be


class Codec:
    """What of DistillKit is used.

    Args:
        folder: the checkout.

    Raises:
        SystemExit: it has no such modules, or they cannot be imported here.

    Attributes:
        commit: of the checkout, "unknown" where git does not say.
        densify: its dense form of kept entries.
        missing: its ways to handle the mass that is not kept, an enumeration.
        sparse_kl_div: its KL loss over the ids that are kept; None where only the codec can be imported.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "distillkit" / "compression").is_dir():
            raise SystemExit(
                f"{folder} is not a checkout of DistillKit: it has no folder distillkit/compression\n"
                "  git clone https://github.com/arcee-ai/DistillKit"
            )
        sys.path.insert(0, str(folder.resolve()))
        try:
            compression = importlib.import_module("distillkit.compression")
            self._compressor, self._config = (
                compression.LogprobCompressor,
                compression.DistributionQuantizationConfig,
            )
            self.densify = importlib.import_module("distillkit.compression.densify").densify
            self.missing = importlib.import_module(
                "distillkit.missing_probability"
            ).MissingProbabilityHandling
        except (ImportError, AttributeError) as error:
            raise SystemExit(f"DistillKit's codec cannot be imported from {folder}: {error}") from error
        if not Path(str(compression.__file__)).is_relative_to(folder.resolve()):
            raise SystemExit(f"another DistillKit was imported before {folder}: {compression.__file__}")
        self.sparse_kl_div: Callable[..., Tensor] | None = None
        try:
            self.sparse_kl_div = importlib.import_module("distillkit.lossfuncs.kl").sparse_kl_div
        except (ImportError, AttributeError) as error:
            print(f"DistillKit's own loss cannot be imported, and is left out: {error}", file=sys.stderr)
        git = ["git", "--git-dir", str(folder / ".git"), "rev-parse", "HEAD"]
        self.commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"

    def compressor(self, vocab_size: int, preset: dict[str, Any]) -> Any:
        """Its compressor with these settings."""
        return self._compressor(config=self._config(d=vocab_size, **preset))


def write(compressor: Any, ids: Tensor, logprobs: Tensor, path: Path) -> tuple[int, int]:
    """Code top-k entries [N, k] in descending order, a block of tokens at a time, into one file.

    Returns:
        The bytes per token of ids and of logprobs.
    """
    parts = [
        compressor.compress_from_sparse(*(values[None] for values in block))
        for block in zip(ids.split(BLOCK), logprobs.split(BLOCK), strict=True)
    ]
    rows = [
        torch.cat([part[name][0] for part in parts]) for name in ("bytepacked_indices", "compressed_logprobs")
    ]
    path.write_bytes(b"".join(row.numpy().tobytes() for row in rows))
    return rows[0].shape[1], rows[1].shape[1]


def read(compressor: Any, path: Path, tokens: int, widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Decode what `write` wrote: ids [N, k] int64 and logprobs [N, k] float32."""
    content = torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())
    indices, logprobs = content.split([tokens * width for width in widths])
    blocks = zip(indices.view(tokens, -1).split(BLOCK), logprobs.view(tokens, -1).split(BLOCK), strict=True)
    parts = [
        compressor.decompress_to_sparse(
            {"bytepacked_indices": packed[None], "compressed_logprobs": coded[None]}
        )
        for packed, coded in blocks
    ]
    return torch.cat([part[0][0] for part in parts]), torch.cat([part[1][0].float() for part in parts])


def as_targets(
    ids: Tensor, logprobs: Tensor, token_ids: Tensor, knee: np.ndarray, vocab_size: int, window: int
) -> CachedTargets:
    """What is not kept is spread evenly, as its `densify` does it under `symmetric_uniform`.

    Args:
        ids, logprobs: [N, k], decoded, in the order in which they are stored, which is that of the teacher.
        knee: [N], Kneedle's k on the teacher's full logits, as the other rows have it.
    """
    tokens, k = ids.shape
    missing = (1 - logprobs.logsumexp(-1).exp()).clamp(min=1e-8 * (vocab_size - k))
    sparse = TokenTargets(
        token_ids=token_ids.numpy().astype(np.uint32),
        k=np.full(tokens, k, np.uint16),
        knee=np.minimum(knee, k),
        ids=ids.flatten().numpy().astype(np.uint32),
        logprobs=logprobs.flatten().numpy(),
        tail_logmass=missing.log().numpy(),
    )
    return CachedTargets.from_sparse(sparse, vocab_size=vocab_size, window=window, min_k=2)


def check_densified(codec: Codec, targets: CachedTargets) -> None:
    """Hold `as_targets` against its own `densify`.

    Raises:
        SystemExit: they differ, so the rows would not be DistillKit's.
    """
    its = codec.densify(
        targets.ids, targets.logprobs, targets.vocab_size, missing=codec.missing.SYMMETRIC_UNIFORM
    )
    difference = float((its - targets.everywhere()).abs().max())
    if difference > 1e-3:
        raise SystemExit(f"DistillKit's densify has other logprobs than we have, by up to {difference:.3g}")


def own_loss_cosines(codec: Codec, targets: CachedTargets, states: States) -> dict[str, dict[str, float]]:
    """Of its own KL loss, which asks only for the ids that are kept, against forward KL to the live teacher.

    Returns:
        missing probability handling -> student -> the mean cosine of the gradients with respect to the
        student's logits.
    """
    if codec.sparse_kl_div is None:
        return {}
    head = OutputHead(states.head)
    found: dict[str, dict[str, list[Tensor]]] = {}
    for some in torch.arange(len(targets)).split(64):
        teacher = head.logits(states.teacher[some]).softmax(-1)
        kept = targets.select(some)
        for student, hidden in states.students.items():
            logits = head.logits(hidden[some]).requires_grad_()
            live = logits.detach().softmax(-1) - teacher
            for missing in codec.missing:
                loss = codec.sparse_kl_div(logits[None], kept.ids[None], kept.logprobs[None], missing=missing)
                gradient = torch.autograd.grad(loss, logits)[0]
                cosines = found.setdefault(missing.value, {}).setdefault(student, [])
                cosines.append(gradient_cosine(live, gradient))
    return {
        missing: {student: float(torch.cat(parts).mean()) for student, parts in students.items()}
        for missing, students in found.items()
    }
