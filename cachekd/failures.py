"""Out of memory, said so that it can be mended; and what a disk says that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
