"""How long a sample may be, and which of its tokens a model has embeddings for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cachekd.config.fields import TooLong
from cachekd.data.sample import Sample
from cachekd.errors import BadSample, LeftOut

MAX_TOKENS = "--max-tokens"
TOO_LONG = "the sample is too long"  # as a reason begins


@dataclass(frozen=True)
class Limits:
    """What models and settings allow of a sample. See `cachekd.models.limits_of`.

    Attributes:
        max_tokens: in all, those of images among them; None: any number.
        max_tokens_of: whose limit that is, for messages.
        too_long: a longer sample is an error ("error"), is left out ("skip"), or loses the end of its last
            answers ("cut").
        embedding_rows: token ids from here on have no embedding; None: not looked at.
        embedding_rows_of: whose these are.
    """

    max_tokens: int | None = None
    max_tokens_of: str = MAX_TOKENS
    too_long: TooLong = "error"
    embedding_rows: int | None = None
    embedding_rows_of: str = "the model"

    def tokens_kept(self, ids: Tensor, supervised: Tensor, is_image: Tensor, sample: Sample) -> int:
        """How many of a sample's tokens are kept, from the first on: all, unless it is too long and is cut.

        What is cut ends with a supervised token, so that nothing stands behind it that teaches nothing. An
        answer that is cut loses its end-of-turn token with its end: what is left is what was said.

        Args:
            ids: [L] int64.
            supervised: [L] bool.
            is_image: [L] bool, the placeholders of images; none of them is ever cut.

        Raises:
            LeftOut: it is too long, and such samples are left out.
            BadSample: it is too long; or an image, or all answers, would be cut off.
        """
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return len(ids)
        if self.too_long != "cut":
            kind = LeftOut if self.too_long == "skip" else BadSample
            raise kind(TOO_LONG, **self._details(len(ids), sample))
        answered = supervised[: self.max_tokens].nonzero()
        kept = int(answered[-1]) + 1 if len(answered) else 0
        if not kept or is_image[kept:].any():
            lost = "an image" if kept else "all answers"
            raise BadSample(
                f"{TOO_LONG}, and cutting it would cut off {lost}",
                **self._details(len(ids), sample),
            )
        return kept

    def require_rows(self, ids: Tensor, is_image: Tensor, tokenizer: Any, where: str) -> None:
        """Refuse tokens without an embedding. (Where an image's placeholder has none, no model looks it up.)

        Args:
            ids, is_image: as for `tokens_kept`.
            where: the sample, for the message.

        Raises:
            BadSample: the sample has one.
        """
        if self.embedding_rows is None:
            return
        beyond = ids[(ids >= self.embedding_rows) & ~is_image]
        if len(beyond):
            token = int(beyond[0])
            raise BadSample(
                f"the model has no embedding for the token {tokenizer.convert_ids_to_tokens(token)!r}",
                where=where,
                expected=f"ids below {self.embedding_rows:,}, the embedding rows of {self.embedding_rows_of}",
                found=f"id {token:,}",
                fix=NO_ROW,
            )

    def _details(self, tokens: int, sample: Sample) -> dict[str, str]:
        otherwise = {"error": LONGER, "skip": LONGER, "cut": "--too-long skip leaves such samples out"}
        wider = f"a larger {MAX_TOKENS}" if self.max_tokens_of == MAX_TOKENS else "a model with a longer one"
        return {
            "where": sample.where,
            "expected": f"at most {self.max_tokens:,} tokens, {self.max_tokens_of}",
            "found": f"{tokens:,} tokens",
            "fix": f"{otherwise[self.too_long]}; or {wider}",
        }


NO_LIMITS = Limits()
LONGER = "--too-long skip leaves such samples out, --too-long cut drops the end of their answers"
NO_ROW = (
    "the tokenizer that the model was trained with; or resize_token_embeddings(len(tokenizer)), whose new "
    "rows are untrained"
)
