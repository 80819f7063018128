"""Tars: which ones a pattern means, wherever fsspec reaches, and where every member of them lies.

The index is found header by header and kept in a few arrays. It makes keys known before anything runs,
repeated ones counted instead of joined in silence, and any sample one range read away. It takes some 50 bytes
a sample besides the key.
"""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np
from braceexpand import braceexpand
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from cachekd.data.sample import require_text
from cachekd.errors import CachekdError, missing_package
from cachekd.paths import is_url

_CHUNK = 1 << 16
# What people's tars hold besides data: a Mac's ._x and .DS_Store, Windows' own, and what is there to be read.
_NO_DATA = re.compile(
    r"\.|(thumbs\.db|desktop\.ini|(readme|licen[cs]e|notice|copying|changelog)(\.(md|txt|rst))?)$",
    re.IGNORECASE,
)


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
        raise missing_package(url, error) from None
    except Exception as error:
        # Every file system of fsspec has its own errors, from OSError to its client library's.
        raise CachekdError(problem, where=url, found=f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class TarIndex:
    """S samples with M members in all; the members of sample i are `starts[i]` to `starts[i + 1]`.

    Attributes:
        urls: of the tars.
        extensions: that occur, in lower case and without the dot.
        names: S, of the members without their extension, in the order of the tars and of each sample's first
            member; a name may come again.
        other_files: members that are no data.
        tars: [S] uint32, into `urls`: a sample lies in one tar.
        starts: [S + 1] int64, into the members.
        kinds: [M] uint32, into `extensions`.
        offsets: [M] int64, bytes.
        sizes: [M] int64, bytes.
    """

    urls: tuple[str, ...]
    extensions: tuple[str, ...]
    names: list[str]
    other_files: tuple[str, ...]
    tars: NDArray[np.uint32]
    starts: NDArray[np.int64]
    kinds: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def url(self, sample: int) -> str:
        """The tar that a sample lies in."""
        return self.urls[self.tars[sample]]

    def members(self, sample: int) -> dict[str, int]:
        """A sample's extensions, in the tar's order, and the numbers of their members."""
        first, end = int(self.starts[sample]), int(self.starts[sample + 1])
        return {self.extensions[self.kinds[member]]: member for member in range(first, end)}

    def read(self, sample: int, member: int) -> bytes:
        """A member's bytes.

        Raises:
            CachekdError: the tar has gone, or changed, since it was indexed.
        """
        url, start, size = self.url(sample), int(self.offsets[member]), int(self.sizes[member])
        if size == 0:
            return b""  # an empty range means the whole file to some servers
        with named_errors(url, "the tar cannot be read"):
            # Looked up each time (20 us) and not kept: connections do not survive a fork or pickling.
            fs, path = url_to_fs(url)
            content = fs.cat_file(path, start=start, end=start + size)
        if len(content) != size:
            raise CachekdError(
                "the tar has become shorter while it was read",
                where=url,
                expected=f"{size} bytes at {start}",
                found=f"{len(content)} bytes",
            )
        return bytes(content)


def index_tars(urls: Sequence[str]) -> TarIndex:
    """Index tars. A name whose extension came before in the same tar begins another sample, as does one that
    came in another tar.

    Raises:
        CachekdError: a tar cannot be read to its end, a member is no plain file, or has no extension.
    """
    names: list[str] = []
    extensions: dict[str, int] = {}
    tars, owners, kinds = array("I"), array("q"), array("I")
    offsets, sizes = array("q"), array("q")
    other_files: list[str] = []
    for number, url in enumerate(urls):
        here: dict[str, tuple[int, set[str]]] = {}  # the last sample of each name, and its extensions
        for info in _files(url):
            if _NO_DATA.match(PurePosixPath(info.name).name):
                other_files.append(f"{info.name} in {url}")
                continue
            name, extension = _split_name(info.name, url)
            if name not in here or extension in here[name][1]:
                here[name] = (len(names), set())
                names.append(name)
                tars.append(number)
            sample, members = here[name]
            members.add(extension)
            owners.append(sample)
            kinds.append(extensions.setdefault(extension, len(extensions)))
            offsets.append(info.offset_data)
            sizes.append(info.size)
    owner = np.frombuffer(owners, np.int64) if owners else np.zeros(0, np.int64)
    order = np.argsort(owner, kind="stable")  # members of one key need not be neighbours
    return TarIndex(
        urls=tuple(urls),
        extensions=tuple(extensions),
        names=names,
        other_files=tuple(other_files),
        tars=np.array(tars, np.uint32),
        starts=np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(names)))]).astype(np.int64),
        kinds=np.array(kinds, np.uint32)[order],
        offsets=np.array(offsets, np.int64)[order],
        sizes=np.array(sizes, np.int64)[order],
    )


def _files(url: str) -> Iterator[tarfile.TarInfo]:
    with named_errors(url, "the tar cannot be read to its end"):
        fs, path = url_to_fs(url)
        try:
            # "r:" and not "r": members are read in place, which a compressed tar does not allow.
            with fs.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                    if not info.isdir():
                        _require_plain(info, url)
                        yield info
                _require_end(stream, tar.offset)
        except (tarfile.ReadError, EOFError) as error:
            raise CachekdError(
                "the tar cannot be read to its end",
                where=url,
                expected="an uncompressed tar, closed by a block of zeros",
                found=str(error),
                fix="fetch or write it again: a truncated tar must not become a shorter data set",
            ) from None


def _require_end(stream: BinaryIO, offset: int) -> None:
    """tarfile stops without a word at a cut between members, at garbage, and where two tars were joined."""
    stream.seek(offset)
    if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end mark at byte {offset}")
    while chunk := stream.read(_CHUNK):
        if chunk.strip(tarfile.NUL):
            raise tarfile.ReadError(f"data after the end mark at byte {offset}, as if two tars were joined")


def _require_plain(info: tarfile.TarInfo, url: str) -> None:
    if not info.isreg() or info.issparse():
        raise CachekdError(
            "a member of the tar is no plain file",
            where=f"{info.name} in {url}",
            expected="files and folders",
            found="a link" if info.islnk() or info.issym() else "a sparse or special file",
            fix="write the tar with --dereference --hard-dereference",
        )


def _split_name(name: str, url: str) -> tuple[str, str]:
    key, extension = base_plus_ext(name)
    if key is None:
        raise CachekdError("a file in the tar has no extension", where=f"{name} in {url}")
    require_text(name, url)
    return key, extension.lower()  # as webdataset does: x.PNG is x.png
