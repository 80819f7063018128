"""What the tokens of two vocabularies stand for, and what both have in common: bytes, and places in a text.

Nothing here needs a tokenizer but `TokenBytes.of`: all else is computed from two tables of bytes.
"""

from cachekd.vocabulary.cells import CellMap
from cachekd.vocabulary.pair import VocabularyPair
from cachekd.vocabulary.rows import PLAIN, Alignment, Lead
from cachekd.vocabulary.token_bytes import TokenBytes

__all__ = ["PLAIN", "Alignment", "CellMap", "Lead", "TokenBytes", "VocabularyPair"]
