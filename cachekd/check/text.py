"""Is a text the same tokens for two models? A cache's tokens are those that its teacher read."""

from __future__ import annotations

from cachekd.cache import LogitCache
from cachekd.errors import CachekdError
from cachekd.models import ModelFiles, check_tokenizers
from cachekd.models.fingerprint import reads_otherwise

# Across tokenizers: what a run may say instead of having one tokenizer.
ALIGN = (
    "--align-vocabulary cells, which compares the two where both have read the same bytes, over classes of "
    "tokens"
)


def check_text(cache: LogitCache, model: ModelFiles, whose: str = "student's", instead: str = "") -> None:
    """Refuse a cache of another tokenizer, chat template or way to encode; no data are needed for it.

    Args:
        whose: the model is.
        instead: what else would help, behind a semicolon.

    Raises:
        CachekdError: what differs, and how.
    """
    theirs, ours = cache.manifest.fingerprints, model.fingerprints
    for name, of_cache, found in (
        ("tokenizer", theirs.tokenizer, ours.tokenizer),
        ("chat template", theirs.chat_template, ours.chat_template),
    ):
        if of_cache != found:
            raise CachekdError(
                f"the cache was made with a different {name} than the {whose}",
                where=f"{cache.path} and {model.path}",
                expected=f"sha256 {of_cache}",
                found=f"sha256 {found}",
                fix=_fix(name, whose, instead),
            )
    if theirs.encoding not in (None, ours.encoding):  # None: an older cache, or one that takes no text alone
        raise CachekdError(
            f"the cache was made with a different encoding of text than the {whose}",
            where=f"{cache.path} and {model.path}",
            expected=f"sha256 {theirs.encoding} over the token ids of a probe text",
            found="it cannot be encoded" if ours.encoding is None else f"sha256 {ours.encoding}",
            fix=f"the teacher's inputs had other tokens than the {whose}, such as a BOS token more or less: "
            + _fix("processor", whose, instead),
        )


def _fix(name: str, whose: str, instead: str) -> str:
    if whose == "student's":
        return f"give the student the teacher's {name}, or run `cachekd dump` again{instead}"
    return f"name the cache's own teacher, or run `cachekd dump` again{instead}"


def require_text_alike(teacher: ModelFiles, student: ModelFiles) -> None:
    """Refuse a pair that is not across tokenizers: the same text has to have the same tokens on both sides.

    Raises:
        CachekdError: what differs, and how.
    """
    instead = f"; or {ALIGN}"
    check_tokenizers(teacher.processor.tokenizer, student.processor.tokenizer, instead=instead)
    theirs, ours = teacher.fingerprints, student.fingerprints
    if not reads_otherwise(theirs, ours):
        return
    template = theirs.chat_template != ours.chat_template
    raise CachekdError(
        "teacher and student have different chat templates"
        if template
        else "teacher and student encode a probe text in different ways",
        where=f"{teacher.path} and {student.path}",
        expected=f"sha256 {theirs.chat_template if template else theirs.encoding}",
        found=f"sha256 {ours.chat_template if template else ours.encoding}",
        fix="save the teacher's chat_template.jinja beside the student's processor" + instead
        if template
        else f"the same kind of processor for both{instead}",
    )
