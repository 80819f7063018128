"""The first token of a text's encoding, from a table of bytes alone.

Byte-pair encoding with ids as ranks: of all adjacent pairs whose joined bytes are a token, the one with the
lowest id is joined first, as tiktoken does. Most vocabularies were written in the order of their merges.
"""

from __future__ import annotations

from cachekd.vocabulary.token_bytes import TokenBytes

_NEVER = 2**62


class Merges:
    """A vocabulary's texts, and how it would cut another text.

    Args:
        tokens: whose names are no texts.

    Attributes:
        ids: of each text the lowest id.
    """

    def __init__(self, tokens: TokenBytes) -> None:
        self.ids: dict[bytes, int] = {}
        twice = False
        for number, content in enumerate(tokens.contents):
            if content and number not in tokens.special:
                twice |= len(content) == 1 and content in self.ids
                self.ids.setdefault(content, number)
        # SentencePiece has characters and, where it has bytes too, some of them twice ("A" and "<0x41>"). Its
        # characters are symbols before anything is joined; those of a byte-level vocabulary come of merges.
        self._by_characters = twice or not any(bytes([byte]) in self.ids for byte in range(0x80, 0x100))
        self._longest = max(map(len, self.ids), default=0)

    def first(self, text: bytes) -> bytes | None:
        """The first token of the encoding of a text, as if it stood in the middle of another.

        Returns:
            A prefix of the text, the whole of it where it is a token; where the encoding begins with what is
            no token, the longest prefix that is one; None if none is.
        """
        if text in self.ids:
            return text
        rank, cuts = self.ids.get, self._symbols(text)
        ranks = [rank(text[a:b], _NEVER) for a, b in zip(cuts, cuts[2:], strict=False)]
        while ranks and (lowest := min(ranks)) != _NEVER:
            at = ranks.index(lowest)
            del cuts[at + 1], ranks[at]
            if at < len(ranks):
                ranks[at] = rank(text[cuts[at] : cuts[at + 2]], _NEVER)
            if at:
                ranks[at - 1] = rank(text[cuts[at - 1] : cuts[at + 1]], _NEVER)
        sizes = (cuts[1] if len(cuts) > 1 else 0, *range(min(len(text), self._longest), 0, -1))
        return next((text[:size] for size in sizes if text[:size] in self.ids), None)

    def _symbols(self, text: bytes) -> list[int]:
        """Where the symbols begin that merging begins with, and the text's end."""
        if not self._by_characters or text.isascii():
            return list(range(len(text) + 1))
        cuts = [0]
        for character in text.decode(errors="surrogateescape"):
            symbol = character.encode(errors="surrogateescape")
            cuts += (
                [cuts[-1] + len(symbol)]
                if symbol in self.ids
                else range(cuts[-1] + 1, cuts[-1] + len(symbol) + 1)
            )
        return cuts
