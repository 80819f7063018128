"""Token ids as people read them."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from cachekd.cache import LogitCache
from cachekd.data import SampleEncoder
from cachekd.errors import CachekdError, first_line
from cachekd.models import load_processor
from cachekd.models.fingerprint import tokenizer_fingerprint
from cachekd.paths import require_path
from cachekd.vocabulary import TokenBytes

_FORMS = "a model's folder, or one with tokenizer.json, or a name on the hub"
_SPACE = "▁"  # how SentencePiece writes one
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # and a byte of a character that it does not know


class TokenTexts:
    """The text of each token by itself.

    Args:
        tokenizer: a transformers tokenizer.
        vocabulary: what each token stands for, where there is no tokenizer; without both, ids are shown as
            "#17".
    """

    def __init__(self, tokenizer: Any = None, vocabulary: TokenBytes | None = None) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._text(token)
        return self._known[token]

    def _text(self, token: int) -> str:
        if self._tokenizer is None and self._vocabulary is not None:
            contents = self._vocabulary.contents
            return text_of(contents[token] if token < len(contents) else b"", token)
        piece = None if self._tokenizer is None else self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # rows that pad an embedding have no token
            return f"#{token}"
        if piece.startswith(_SPACE):  # which decoding would strip
            return piece.replace(_SPACE, " ")
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if text.strip("\ufffd"):
            return text
        # A part of a character has no text of its own; a byte-level piece would look like another letter.
        return piece if not text or _BYTE.fullmatch(piece) else f"{text}#{token}"


def text_of(content: bytes, token: int) -> str:
    """The text of the bytes that a token stands for.

    >>> text_of(b" caf\xc3\xa9", 7), text_of(b"\xc3", 8), text_of(b"", 9)
    (' café', '<0xC3>', '#9')
    """
    text = content.decode(errors="replace")
    if text.strip("\ufffd"):
        return text
    # A part of a character has no text of its own.
    return "".join(f"<0x{byte:02X}>" for byte in content) or f"#{token}"


@dataclass(frozen=True)
class TokenReader:
    """What a cache's tokens are read with.

    Attributes:
        texts: of single tokens.
        processor: the teacher's, whose chat template tells the answers apart; None where only a tokenizer,
            or nothing, was found.
        vocabulary: what each of the teacher's tokens stands for, as the cache says it; None: it does not.
    """

    texts: TokenTexts
    processor: Any = None
    vocabulary: TokenBytes | None = None

    @property
    def token_bytes(self) -> TokenBytes:
        """What each of the teacher's tokens stands for.

        Raises:
            CachekdError: the cache does not say it, and there is no processor that does.
        """
        if self.vocabulary is not None:
            return self.vocabulary
        if self.processor is None:
            raise CachekdError(
                "it is not known which bytes the teacher's tokens stand for",
                where="the cache, which an older version made",
                expected="the teacher's folder, with tokenizer and chat template",
                fix="pass --tokenizer PATH",
            )
        return TokenBytes.of(self.processor.tokenizer, SampleEncoder(self.processor).end_of_turn)


def find_reader(cache: LogitCache, path: str | None) -> TokenReader:
    """The processor, or the tokenizer alone, with which the cache was made; else what the cache itself says.

    Args:
        path: folder or hub name; None: where the manifest says that the teacher was, if that is here.

    Raises:
        CachekdError: `path` has no tokenizer, or the tokenizer is another one than the cache's.
    """
    source, vocabulary = path or cache.manifest.teacher.name, cache.vocabulary
    if path is None and not Path(source).is_dir():
        return TokenReader(TokenTexts(vocabulary=vocabulary), vocabulary=vocabulary)
    found = _load(source)
    processor = None if isinstance(found, PreTrainedTokenizerBase) else found
    tokenizer: Any = found if processor is None else processor.tokenizer
    expected, ours = cache.manifest.fingerprints.tokenizer, tokenizer_fingerprint(tokenizer)
    if ours != expected:
        raise CachekdError(
            "this is not the tokenizer that the cache was made with",
            where=source,
            expected=f"sha256 {expected}",
            found=f"sha256 {ours}",
            fix="pass the teacher's own: --tokenizer PATH",
        )
    return TokenReader(TokenTexts(tokenizer), processor, vocabulary)


def _load(source: str) -> Any:
    """A processor, of a language model too, or what else of a folder's has a tokenizer."""
    require_path(source, "tokenizer", _FORMS)
    with suppress(CachekdError):  # a tokenizer may stand in a folder without a model
        return load_processor(source)
    problem = "nothing"
    for kind in (AutoProcessor, AutoTokenizer):
        try:
            found = kind.from_pretrained(source)
        except (OSError, ValueError, ImportError) as error:
            problem = first_line(error)
            continue
        if isinstance(found, PreTrainedTokenizerBase | ProcessorMixin):
            return found
        problem = type(found).__name__  # such as an image processor alone
    raise CachekdError(
        "no tokenizer can be loaded",
        where=source,
        expected=_FORMS,
        found=problem,
        fix="pass --tokenizer PATH",
    )
