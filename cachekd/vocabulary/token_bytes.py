"""What each token id of a vocabulary stands for: bytes of text, or a name.

A text is compared across tokenizers by its bytes. The strings of two vocabularies cannot be compared: one
writes a blank as "Ġ" and the other as "▁". Decoding token by token does not work either, because many tokens
are a part of a character.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cachekd.errors import CachekdError

_BYTE = re.compile(
    "<0x([0-9A-Fa-f]{2})>"
)  # how SentencePiece writes a byte of a character that it does not know
_SPACE = "▁"  # how it writes a blank, U+2581
_PROBE = "Is this a red 'square'? No: it has 3 corners,\nsee (e.g.) page 12.\tЗа 5 €!"
Reading = Callable[[str], str]


@dataclass(frozen=True)
class TokenBytes:
    """What each token id of a vocabulary stands for, in the middle of a text.

    Attributes:
        contents: by id, 0 to V - 1, V being the largest id plus 1: the bytes of text, or of a name; b"" where
            nothing is known of an id. Several ids may have the same bytes.
        special: ids whose content is a name, such as <|im_end|>, and not text; `end_of_turn` is one of them.
        end_of_turn: what the chat template ends an answer with; None where it writes no such token.
    """

    contents: tuple[bytes, ...]
    special: frozenset[int]
    end_of_turn: int | None

    @classmethod
    def of(cls, tokenizer: Any, end_of_turn: int | None) -> TokenBytes:
        """Read a transformers tokenizer.

        Byte-level tokenizers write a byte as one character of GPT-2's alphabet; SentencePiece-like ones write
        a blank as U+2581 and some bytes as <0x0A>; others join words with blanks. Which it is, the decoder of
        `tokenizer.json` says. A first word that a tokenizer prefixes with a blank has that blank here.

        Args:
            tokenizer: a fast one, with a `backend_tokenizer` of the library tokenizers.

        Raises:
            CachekdError: it is a slow one, or it cannot be told what its tokens stand for: its decoder is
                none of these, or a text's tokens are decoded to something else.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        where = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        if backend is None:
            raise CachekdError(
                "the tokenizer does not say which bytes its tokens stand for",
                where=where,
                expected="a fast tokenizer (tokenizer.json)",
                found=type(tokenizer).__name__,
            )
        state = json.loads(backend.to_str())
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        added = {token["id"]: token for token in state["added_tokens"]}
        special = {number for number, token in added.items() if token["special"]}
        special |= set() if end_of_turn is None else {end_of_turn}
        of_piece, of_added = _readings(backend, state, where)
        contents = [b""] * (max([*vocabulary.values(), *special], default=-1) + 1)
        for piece, number in vocabulary.items():
            if number in special:
                contents[number] = piece.encode()
            else:
                contents[number] = (of_added if number in added else of_piece)(piece)
        found = cls(tuple(contents), frozenset(special), end_of_turn)
        found._require_as_decoded(backend, where)
        return found

    def _require_as_decoded(self, backend: Any, where: str) -> None:
        """Have a text's tokens stand for what they are decoded to.

        Raises:
            CachekdError: they do not, so that the decoder was misread.
        """
        ids = backend.encode(_PROBE, add_special_tokens=False).ids
        text = b"".join(self.contents[number] for number in ids if number not in self.special)
        ours, decoded = text.decode(errors="replace"), str(backend.decode(ids, skip_special_tokens=True))
        if ours.strip() != decoded.strip():
            raise _untold(where, repr(decoded), repr(ours))

    def __len__(self) -> int:
        return len(self.contents)

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over all of it."""
        sizes = np.array([len(content) for content in self.contents], "<i8")
        rest = json.dumps([sorted(self.special), self.end_of_turn])
        found = hashlib.sha256(f"{len(self)} {rest} ".encode())
        found.update(sizes.tobytes())
        found.update(b"".join(self.contents))
        return found.hexdigest()


def _readings(
    backend: Any, state: dict[str, Any], where: str
) -> tuple[Callable[[str], bytes], Callable[[str], bytes]]:
    """What a piece of the model's stands for, and what an added token does.

    Args:
        state: of `tokenizer.json`.

    Raises:
        CachekdError: the decoder is of an unknown kind.
    """
    steps = _steps(state.get("decoder"), "decoders")
    if not steps:  # then the pieces are joined with blanks, unless the text was cut up in one of these ways
        before = _steps(state.get("pre_tokenizer"), "pretokenizers")
        steps = [step for step in before if step["type"] in ("ByteLevel", "Metaspace")]
    if not steps:
        return _joined, _joined
    if any(step["type"] == "ByteLevel" for step in steps):
        return _byte_level, str.encode
    with_bytes = any(step["type"] == "ByteFallback" for step in steps) or state["model"].get("byte_fallback")
    readings = [reading for step in steps if (reading := _reading(step, backend, where)) is not None]

    def read(piece: str) -> bytes:
        if with_bytes and (byte := _BYTE.fullmatch(piece)) is not None:
            return bytes([int(byte[1], 16)])
        for reading in readings:
            piece = reading(piece)
        return piece.encode()

    return read, read


def _steps(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The parts of a decoder or pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part[inside] for step in _steps(each, inside)]


def _reading(step: dict[str, Any], backend: Any, where: str) -> Reading | None:
    """What a step of a decoder does to a piece that stands behind another; None: nothing."""
    kind = step["type"]
    if kind in ("ByteFallback", "Fuse", "Strip"):  # Strip takes away a blank before the first word
        return None
    if kind == "Replace" and "String" in step["pattern"]:
        before, after = step["pattern"]["String"], step["content"]
        return lambda piece: piece.replace(before, after)
    if kind == "Metaspace":
        space = step.get("replacement", _SPACE)
        return lambda piece: piece.replace(space, " ")
    if kind == "WordPiece":  # which also knows before what there is no blank
        return lambda piece: str(backend.decoder.decode(["a", piece])[1:])
    if kind == "BPEDecoder":
        suffix = step["suffix"]
        return lambda piece: piece.replace(suffix, " ")
    expected = "a decoder of ByteLevel, ByteFallback, Replace, Metaspace, WordPiece or BPEDecoder"
    raise _untold(where, expected, f"{kind} with a regular expression" if kind == "Replace" else str(kind))


def _untold(where: str, expected: str, found: str) -> CachekdError:
    return CachekdError(
        "it cannot be told which bytes the tokens of this tokenizer stand for",
        where=where,
        expected=expected,
        found=found,
    )


def _joined(piece: str) -> bytes:
    """A word of a tokenizer that joins its tokens with blanks."""
    return f" {piece}".encode()


def _byte_level(piece: str) -> bytes:
    """A piece in GPT-2's alphabet; one with other characters stands for itself, as in the library."""
    try:
        return bytes(_ALPHABET[character] for character in piece)
    except KeyError:
        return piece.encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's: a byte that Latin-1 can show is written so, the others as the characters from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _alphabet()
