"""The exceptions that users are meant to see."""

from __future__ import annotations

from functools import partial
from typing import Any


class CachekdError(Exception):
    """Bad input or a stale cache: what is wrong, where, expected against found, and what to do next.

    The CLI prints it without a traceback and exits with code 2.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.where, self.expected, self.found, self.fix = problem, where, expected, found, fix
        lines = [problem]
        for label, value in (("where", where), ("expected", expected), ("found", found), ("try", fix)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the fields: worker processes send these, and Exception's own way knows the text only."""
        rebuild = partial(
            type(self), where=self.where, expected=self.expected, found=self.found, fix=self.fix
        )
        return rebuild, (self.problem,)


class BadSample(CachekdError):
    """One sample cannot be used, the rest of its data set can; `--on-error skip` leaves it out."""


class LeftOut(BadSample):
    """A sample that the settings leave out, whatever `--on-error` says."""
