"""The tail sketch as a cache carries it: every logprob of the teacher, approximately, from a few small codes.

A teacher's logits are linear in its final hidden state h. So a cache that keeps h approximately has all of
them approximately. `fit.py` chooses the C axes that are kept, and their codes; this module rebuilds the
logprobs from them:

    logit_j = offset_j + basis_j . y      with y_c from the code along axis c
    logprob_j = cap(logit_j) - shift      with the shift stored per token

No teacher weights are needed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachekd.cache.array_rules import MOST_CODE, POSITIVE, ArrayRule
from cachekd.cache.container import damaged, pack_arrays, read_arrays
from cachekd.cache.sparse_logits import SketchCodes
from cachekd.losses.chunked import at_a_time

SHIFT_STEP = 1 / 32  # nats
FINE_SHIFT_STEP = 1 / 512  # of the axis that takes what is left of the shift, if there is one
FARTHEST = 6e4  # units; float16 ends at 65,504
CENTROIDS = 2  # codes of magnitude 1 and 2 are rebuilt at their mean, larger ones at their middle

SKETCH_FORMAT = {"format": "cachekd-sketch", "format_version": 1}
RULES = {
    "basis": ArrayRule(("int16",), ("axes", "vocab_size"), least=-MOST_CODE),
    "basis_step": ArrayRule(("float64",), (1,), least=POSITIVE),
    "offset": ArrayRule(("float32",), ("vocab_size",)),
    "unit": ArrayRule(("float32",), ("axes",), least=POSITIVE),
    "centroids": ArrayRule(("float32",), (CENTROIDS, "axes"), least=0),
    "softcap": ArrayRule(("float64",), ("softcaps",), least=POSITIVE),
}
_ROWS = 2**12  # of `codes` looked at together, where few at a time will do


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap); the logits themselves without a cap."""
    return logits if softcap is None else (logits / softcap).tanh() * softcap


@dataclass(frozen=True)
class TailSketch:
    """The part that all tokens share.

    Attributes:
        codes: [V, C] int16, the basis in steps of `basis_step`: logits per unit of each axis, an axis' unit
            being its standard deviation on the calibration tokens.
        basis_step: nats.
        offset: [V] float32, logits at the mean.
        unit: [C] float32, units per code step.
        centroids: [CENTROIDS, C] float32, where codes of magnitude 1, 2 are rebuilt; in units.
        softcap: logits are softcap * tanh(logit / softcap); None if they are not capped.
        path, sha256: the file it came from, from which other processes read it.
    """

    codes: Tensor
    basis_step: float
    offset: Tensor
    unit: Tensor
    centroids: Tensor
    softcap: float | None
    path: Path | None = None
    sha256: str | None = None
    _basis: list[Tensor] = field(default_factory=list, repr=False, compare=False)
    _copies: dict[torch.device, TailSketch] = field(default_factory=dict, repr=False, compare=False)

    @property
    def vocab_size(self) -> int:
        return self.codes.shape[0]

    @property
    def axes(self) -> int:
        """C."""
        return self.codes.shape[1]

    @property
    def basis(self) -> Tensor:
        """[V, C] float16, made once: half the memory of float32, and that is what `gather` waits for."""
        if not self._basis:
            self._basis.append((self.codes.float() * self.basis_step).half())
        return self._basis[0]

    def to(self, device: torch.device | str) -> TailSketch:
        """Copy it to `device`, once for each."""
        device = torch.empty(0, device=device).device  # with its index, where it has none
        if device == self.offset.device:
            return self
        if device not in self._copies:
            names = ("codes", "offset", "unit", "centroids")
            moved = {name: getattr(self, name).to(device) for name in names}
            self._copies[device] = replace(self, **moved, path=None, _basis=[], _copies={})
        return self._copies[device]

    def forget_copies(self) -> None:
        """Let go of the copies on other devices."""
        self._copies.clear()

    def rebuild(self, coordinates: Tensor) -> Tensor:
        """[N, C] integer codes to [N, C] float32, in units."""
        size = coordinates.abs()
        value = size * self.unit
        for magnitude, centroid in enumerate(self.centroids, 1):
            value = torch.where(size == magnitude, centroid, value)
        return value.copysign(coordinates)

    def logits(self, coordinates: Tensor, ids: Tensor) -> Tensor:
        """[N, K] float32, the rebuilt logits at `ids` [N, K] from codes [N, C]."""
        basis = self.basis
        y = self.rebuild(coordinates).clamp(-FARTHEST, FARTHEST).to(basis.dtype)
        rows = max(1, at_a_time(ids.device) // max(1, ids.shape[1] * self.axes))
        # index_select is twice as fast as basis[ids] on a CPU.
        parts = [
            torch.bmm(basis.index_select(0, some.flatten()).view(*some.shape, self.axes), of[:, :, None])[
                :, :, 0
            ]
            for some, of in zip(ids.split(rows), y.split(rows), strict=True)
        ]
        return capped(torch.cat(parts).float() + self.offset[ids], self.softcap)

    def all_logits(self, coordinates: Tensor) -> Tensor:
        """Rebuild the logits at every id, [N, V] float32."""
        return capped(self.rebuild(coordinates) @ self.basis.float().T + self.offset, self.softcap)

    def farthest(self) -> Tensor:
        """[V] float32, by how much codes can move each logit at the most, and its offset."""
        most = self.unit * MOST_CODE
        rows = self.codes.split(_ROWS)
        moved = [(some.abs().float() * self.basis_step).half().float() @ most for some in rows]
        return self.offset.abs() + torch.cat(moved)

    def arrays(self) -> dict[str, NDArray]:
        """What its file holds."""
        return {
            "basis": np.ascontiguousarray(self.codes.T.cpu().numpy()).astype("<i2"),
            "basis_step": np.array([self.basis_step], "<f8"),
            "offset": self.offset.cpu().numpy().astype("<f4"),
            "unit": self.unit.cpu().numpy().astype("<f4"),
            "centroids": self.centroids.cpu().numpy().astype("<f4"),
            "softcap": np.array([] if self.softcap is None else [self.softcap], "<f8"),
        }

    def pack(self) -> bytes:
        """The file's bytes, for reading only: a cache's own has what `SketchEncoder` adds."""
        return pack_arrays(self.arrays(), SKETCH_FORMAT)

    def __reduce__(self) -> tuple:
        # To another process goes the way to the file, not some hundred megabytes with every batch.
        if self.path is not None:
            return read_sketch, (self.path, self.sha256)
        names = ("codes", "basis_step", "offset", "unit", "centroids", "softcap")
        return TailSketch, tuple(getattr(self, name) for name in names)

    def __deepcopy__(self, _memo: dict) -> TailSketch:
        return self  # nothing in it changes


def with_shift_axis(sketch: TailSketch) -> TailSketch:
    """One more axis, along which all logits move alike, in steps of FINE_SHIFT_STEP.

    What the shift's own step leaves is the same for all of a token's ids that are not kept. So it does not
    average out as the codes' noise does: every difference to an id that is kept is off by it.
    """
    codes, unit = 2**15 - 1, FINE_SHIFT_STEP / ((2**15 - 1) * sketch.basis_step)
    return replace(
        sketch,
        codes=torch.cat([sketch.codes, torch.full_like(sketch.codes[:, :1], codes)], 1),
        unit=torch.cat([sketch.unit, sketch.unit.new_tensor([unit])]),
        centroids=torch.cat([sketch.centroids, sketch.unit.new_tensor([[unit], [2 * unit]])], 1),
        _basis=[],
        _copies={},
    )


def read_sketch(path: Path, sha256: str | None = None, shape: tuple[int, int] | None = None) -> TailSketch:
    """Read a cache's sketch; once per process, while the file stays the same.

    Args:
        sha256: of the file, if it is known.
        shape: axes and ids that it must have, if they are known: compared before anything is decoded.

    Raises:
        CachekdError: it is missing or damaged.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise damaged(path, str(error)) from None
    return _read(path, sha256, shape, status.st_mtime_ns, status.st_size)


def forget_sketches() -> None:
    """Let go of the sketches that were read, and so of their copies on other devices."""
    _read.cache_clear()


@functools.lru_cache(maxsize=16)  # a merged cache has several
def _read(
    path: Path, sha256: str | None, shape: tuple[int, int] | None, _changed: int, _size: int
) -> TailSketch:
    axes, vocab_size = shape or (None, None)
    sizes = {"axes": axes, "vocab_size": vocab_size}
    arrays = read_arrays(path, list(RULES), SKETCH_FORMAT, sha256, RULES, sizes)
    basis, unit, softcap = arrays["basis"], arrays["unit"], arrays["softcap"]
    if len(softcap) > 1:
        raise damaged(path, f"softcap {softcap[:3]}, expected one positive number or none")
    sketch = TailSketch(
        codes=torch.from_numpy(np.ascontiguousarray(basis.T)),
        basis_step=float(arrays["basis_step"][0]),
        offset=torch.from_numpy(arrays["offset"]),
        unit=torch.from_numpy(unit),
        centroids=torch.from_numpy(arrays["centroids"]),
        softcap=float(softcap[0]) if len(softcap) else None,
        path=path,
        sha256=sha256,
    )
    middle = torch.arange(1, CENTROIDS + 1)[:, None] * sketch.unit
    if ((sketch.centroids - middle).abs() > 0.501 * sketch.unit).any():
        raise damaged(path, "a centroid is not within its cell")
    if not sketch.farthest().isfinite().all():
        raise damaged(path, "basis and unit lead to logits that are not finite")
    return sketch


@dataclass(frozen=True)
class SketchTail:
    """The sketch of N tokens, as the tail of their `CachedTargets`.

    Attributes:
        sketch: the part that all tokens share.
        coordinates: [N, C] int16.
        shift: [N] float32, nats.
    """

    sketch: TailSketch
    coordinates: Tensor
    shift: Tensor

    @classmethod
    def from_codes(cls, sketch: TailSketch, codes: SketchCodes) -> SketchTail:
        """Read a shard's arrays."""
        shift: NDArray[np.float32] = codes.shift.astype(np.float32) * np.float32(SHIFT_STEP)
        return cls(sketch, torch.from_numpy(codes.coordinates), torch.from_numpy(shift))

    def gather(self, ids: Tensor) -> Tensor:
        """Rebuild logprobs [N, K] float32 at `ids` [N, K]."""
        return self.sketch.logits(self.coordinates, ids) - self.shift[:, None]

    def everywhere(self, vocab_size: int) -> Tensor:
        """Rebuild all logprobs [N, V] float32, V the sketch's own."""
        return self.sketch.all_logits(self.coordinates) - self.shift[:, None]

    def select(self, rows: Tensor) -> SketchTail:
        """Take some tokens."""
        return SketchTail(self.sketch, self.coordinates[rows], self.shift[rows])

    def cat(self, others: list[SketchTail]) -> SketchTail:
        """Join this and others of the same sketch, one after the other."""
        parts = [self, *others]
        return SketchTail(
            self.sketch,
            torch.cat([part.coordinates for part in parts]),
            torch.cat([part.shift for part in parts]),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SketchTail:
        """Copy it to `device`."""
        return SketchTail(
            self.sketch.to(device),
            self.coordinates.to(device, non_blocking=non_blocking),
            self.shift.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> SketchTail:
        """Copy it to page-locked memory; the sketch goes to a device once, and stays as it is."""
        return SketchTail(self.sketch, self.coordinates.pin_memory(), self.shift.pin_memory())
