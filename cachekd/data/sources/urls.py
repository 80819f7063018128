"""Which tars a pattern means: globs and braces, on this disk or wherever fsspec reaches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from braceexpand import braceexpand
from fsspec.core import url_to_fs

from cachekd.errors import CachekdError
from cachekd.paths import is_url


def is_tar(spec: str) -> bool:
    """Whether a path or URL (a signed one has `?...` at its end), or its last pattern, names a tar."""
    path = spec.partition("?")[0] if _scheme(spec).startswith("http") else spec
    return path.endswith((".tar", ".tar}"))


def find_tars(spec: str) -> list[str]:
    """Expand braces (in order), then globs (sorted).

    Args:
        spec: a path, glob or brace pattern, or such a URL.

    Returns:
        Paths or URLs, at least one. Only globs are looked up; the others are opened later.

    Raises:
        CachekdError: unbalanced braces, a glob that matches nothing, or a file system that cannot be reached.
    """
    if not is_url(spec) and os.path.isfile(spec):
        return [spec]  # its name is no pattern, whatever is in it
    try:
        patterns = list(braceexpand(spec, escape=False))
    except ValueError as error:
        raise CachekdError("the pattern has unbalanced braces", where=spec, found=str(error)) from None
    return [tar for pattern in patterns for tar in _matches(pattern)]


def _matches(pattern: str) -> list[str]:
    # In a web address "?" starts the query and is no wildcard.
    wildcards = "*[" if _scheme(pattern).startswith("http") else "*?["
    if not any(character in pattern for character in wildcards):
        return [pattern]
    with named_errors(pattern, "the pattern cannot be looked up"):
        fs, path = url_to_fs(pattern)
        found = sorted(str(name) for name in fs.glob(path))
    if not found:
        raise CachekdError(
            "no tar matches the pattern",
            where=pattern,
            expected="at least one file",
            found="none",
            fix="check the path; quote the pattern, so that it is not the shell that expands it",
        )
    if not is_url(pattern):
        return found
    # The whole chain is kept: a match of simplecache::s3://b/*.tar is simplecache::s3://b/0.tar.
    chain = pattern[: pattern.rfind("::") + 2] if "::" in pattern else ""
    return [chain + fs.unstrip_protocol(name) for name in found]


def _scheme(url: str) -> str:
    """`s3` of `simplecache::s3://bucket/x`; empty for a path."""
    return url.rpartition("::")[2].partition("://")[0] if "://" in url else ""


@contextmanager
def named_errors(url: str, problem: str) -> Iterator[None]:
    """Turn whatever a file system raises into a CachekdError that names the file.

    Raises:
        CachekdError: the block raised, with the problem given (or that the file does not exist).
    """
    try:
        yield
    except (CachekdError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise CachekdError(
            "the tar does not exist, or has gone while it was read", where=url, found=str(error)
        ) from None
    except ImportError as error:
        raise CachekdError(
            "a package is missing that reads such addresses", where=url, found=str(error), fix=str(error)
        ) from None
    except Exception as error:
        # Every file system of fsspec has its own errors, from OSError to its client library's.
        raise CachekdError(problem, where=url, found=f"{type(error).__name__}: {error}") from error
