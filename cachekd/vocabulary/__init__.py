"""What the tokens of a vocabulary stand for."""

from cachekd.vocabulary.token_bytes import TokenBytes

__all__ = ["TokenBytes"]
