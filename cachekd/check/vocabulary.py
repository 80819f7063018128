"""What the token ids of a cache, and those of which there are logits, stand for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cachekd.cache import LogitCache
from cachekd.errors import CachekdError
from cachekd.models import ModelFiles
from cachekd.models.fingerprint import reads_otherwise
from cachekd.paths import is_url
from cachekd.vocabulary import TokenBytes


def vocabulary_of_cache(cache: LogitCache, others: Iterable[ModelFiles] = (), *, fix: str) -> TokenBytes:
    """As the cache says itself; or, of an older one, as a model says that reads text as its teacher did. Ids
    that the cache has no logprobs of are left out.

    Args:
        others: models that may, beside the teacher where the dump found it.
        fix: what to do about it where nobody says it.

    Raises:
        CachekdError: the cache says nothing, and none of the models reads text so.
    """
    teacher, stored = cache.manifest.teacher, cache.vocabulary
    if stored is not None:
        return cut_to(stored, teacher.vocab_size)
    is_here = not is_url(teacher.name) and Path(teacher.name).is_dir()
    asked = [*others, *([ModelFiles(teacher.name)] if is_here else [])]
    for files in asked:
        if not reads_otherwise(cache.manifest.fingerprints, files.fingerprints):
            return cut_to(files.token_bytes, teacher.vocab_size)
    names = ", ".join(dict.fromkeys(files.path for files in asked))
    otherwise = f"; {names}: another tokenizer, chat template or encoding than the teacher's" if names else ""
    raise CachekdError(
        "the cache does not say what its token ids stand for, and the teacher's tokenizer is not at hand",
        where=str(cache.path),
        expected="a cache with the teacher's token bytes, which `cachekd dump` writes now, or its tokenizer",
        found=f"a cache of {teacher.name} without them{otherwise}",
        fix=fix,
    )


def cut_to(tokens: TokenBytes, ids: int) -> TokenBytes:
    """Leave the ids out of which a model has no logits: a cell of such ids alone would have no mass."""
    if len(tokens) <= ids:
        return tokens
    special = frozenset(number for number in tokens.special if number < ids)
    ending = tokens.end_of_turn if tokens.end_of_turn in special else None
    return TokenBytes(tokens.contents[:ids], special, ending)
