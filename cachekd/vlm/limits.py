"""What several models allow of one sample: the smaller context, the fewer embedding rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cachekd.config.data import TooLong
from cachekd.data.limits import MAX_TOKENS, Limits

# transformers maps older names (`n_positions`, ...) to the first; MPT alone has another. A scaled RoPE's is
# the scaled one; a model without positions (Bloom, Mamba) has none.
_CONTEXT = ("max_position_embeddings", "max_seq_len")


def limits_of(
    configs: Iterable[Any], *, max_tokens: int | None = None, too_long: TooLong = "error"
) -> Limits:
    """The limits of the models that are to read the same samples.

    Args:
        configs: of `load_config`.
        max_tokens: lowers the models' own limit; it never raises it.
        too_long: what becomes of a longer sample, see `Limits`.
    """
    contexts: dict[str, int] = {} if max_tokens is None else {MAX_TOKENS: max_tokens}
    rows: dict[str, int] = {}
    for config in configs:
        text, name = config.get_text_config(), str(config.name_or_path)
        found = next((n for field in _CONTEXT if (n := getattr(text, field, None))), None)
        if found is not None:
            contexts[f"the context of {name}"] = found
        if getattr(text, "vocab_size", None):
            rows[name] = text.vocab_size
    shortest, fewest = (min(found, key=found.__getitem__, default=None) for found in (contexts, rows))
    return Limits(
        max_tokens=contexts.get(shortest or ""),
        max_tokens_of=shortest or MAX_TOKENS,
        too_long=too_long,
        embedding_rows=rows.get(fewest or ""),
        embedding_rows_of=fewest or "the model",
    )
