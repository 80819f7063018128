"""vocabulary.zarr.zip: what each of the teacher's token ids stands for, for readers without its tokenizer.

It follows from the teacher's tokenizer and its chat template, whose fingerprints the manifest has.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cachekd.cache.array_rules import ArrayRule
from cachekd.cache.container import damaged, pack_arrays, read_arrays
from cachekd.cache.layout import VOCABULARY_FILE
from cachekd.cache.manifest import MOST_TOKENS, VocabularyInfo
from cachekd.cache.sparse_logits import offsets
from cachekd.errors import CachekdError
from cachekd.vocabulary import TokenBytes

VOCABULARY_FORMAT = {"format": "cachekd-vocabulary", "format_version": 1}
MOST_CONTENTS = 2**26  # bytes of all tokens; 262,145 of Gemma 3 have 2,040,070
_LONGEST = 2**16 - 1  # bytes of a token; the longest of the usual vocabularies have 128
# Over V token ids (`ids`).
RULES = {
    # The bytes of each id, one after the other.
    "contents": ArrayRule(("uint8",), ("bytes",)),
    # How many each id has.
    "lengths": ArrayRule(("uint16",), ("ids",)),
    # Ids whose content is a name, and not text.
    "special": ArrayRule(("uint32",), ("names",), below="ids", order="ascending"),
    # The id that ends an answer; empty where there is none.
    "end_of_turn": ArrayRule(("uint32",), ("ends",), below="ids"),
}


class PackedVocabulary(NamedTuple):
    """A table's file.

    Attributes:
        content: its bytes; equal tables give equal ones.
        info: what the manifest says of it.
    """

    content: bytes
    info: VocabularyInfo


def pack_vocabulary(table: TokenBytes, vocab_size: int) -> PackedVocabulary:
    """Make a table's file.

    Args:
        vocab_size: ids that the teacher's logprobs are of; the table may have more.

    Raises:
        CachekdError: it has fewer ids than that, or more, or longer tokens, than the format holds.
    """
    lengths = np.array([len(content) for content in table.contents], np.int64)
    total = int(lengths.sum())
    longest = int(lengths.max(initial=0))
    if not vocab_size <= len(table) <= MOST_TOKENS or longest > _LONGEST or total > MOST_CONTENTS:
        raise CachekdError(
            "the bytes of the token ids do not fit into a cache",
            expected=f"{vocab_size:,} to {MOST_TOKENS:,} ids, at most {_LONGEST:,} bytes each and "
            f"{MOST_CONTENTS:,} in all",
            found=f"{len(table):,} ids, up to {longest:,} bytes each and {total:,} in all",
        )
    arrays = {
        "contents": np.frombuffer(b"".join(table.contents), "u1"),
        "lengths": lengths.astype("<u2"),
        "special": np.array(sorted(table.special), "<u4"),
        "end_of_turn": np.array([] if table.end_of_turn is None else [table.end_of_turn], "<u4"),
    }
    content = pack_arrays(arrays, VOCABULARY_FORMAT)
    sha256 = hashlib.sha256(content).hexdigest()
    info = VocabularyInfo(name=VOCABULARY_FILE, tokens=len(table), bytes=len(content), sha256=sha256)
    return PackedVocabulary(content, info)


class Difference(NamedTuple):
    """Where two tables differ, in words: what the one says and what the other."""

    expected: str
    found: str


def difference(expected: TokenBytes, found: TokenBytes) -> Difference | None:
    """What differs between two tables, the first of it; None if nothing does."""
    if expected == found:
        return None
    if len(expected) != len(found):
        return Difference(*(f"{len(table):,} ids" for table in (expected, found)))
    if expected.end_of_turn != found.end_of_turn:
        return Difference(*(f"end of turn {table.end_of_turn}" for table in (expected, found)))
    pairs = enumerate(zip(expected.contents, found.contents, strict=True))
    where = [place for place, (one, other) in pairs if one != other]
    where = sorted({*where, *(expected.special ^ found.special)})
    more = f" (and {len(where) - 1:,} more ids)" if where[1:] else ""
    return Difference(*(f"id {where[0]} {_told(table, where[0])}{more}" for table in (expected, found)))


def require_same_vocabulary(before: TokenBytes, table: TokenBytes, where: str) -> None:
    """Refuse to join caches that say different things.

    Args:
        before: of the caches before it.
        where: `table` stands.

    Raises:
        CachekdError: they differ; in what.
    """
    if (found := difference(before, table)) is not None:
        raise CachekdError(
            "the bytes of the token ids differ between the caches, though their tokenizer is the same",
            where=where,
            expected=f"what the caches before it say: {found.expected}",
            found=found.found,
            fix="`cachekd verify` of each, with --teacher and --data, says which one is wrong",
        )


def _told(table: TokenBytes, token: int) -> str:
    return f"is {'the name ' if token in table.special else ''}{table.contents[token][:40]!r}"


def read_vocabulary(path: Path, info: VocabularyInfo) -> TokenBytes:
    """Read a cache's table.

    Args:
        path: the file.
        info: what the manifest says of it.

    Raises:
        CachekdError: it is missing, damaged, or not what the manifest says.
    """
    sizes: dict[str, int | None] = {"ids": info.tokens}
    # What the contents must take is known before they are decoded.
    arrays = read_arrays(
        path, ["lengths", "special", "end_of_turn"], VOCABULARY_FORMAT, info.sha256, RULES, sizes
    )
    ends = offsets(arrays["lengths"])
    if ends[-1] > MOST_CONTENTS:
        raise damaged(path, f"lengths add up to {ends[-1]:,}, expected {MOST_CONTENTS:,} at most")
    if len(arrays["end_of_turn"]) > 1:
        raise damaged(path, f"{len(arrays['end_of_turn']):,} ends of a turn, expected one or none")
    sizes["bytes"] = int(ends[-1])
    contents = read_arrays(path, ["contents"], VOCABULARY_FORMAT, info.sha256, RULES, sizes)["contents"]
    text = contents.tobytes()
    return TokenBytes(
        contents=tuple(text[first:last] for first, last in pairwise(ends.tolist())),
        special=frozenset(arrays["special"].tolist()),
        end_of_turn=next(iter(arrays["end_of_turn"].tolist()), None),
    )
