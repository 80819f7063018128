"""Is a text the same tokens for two models? A cache's tokens are those that its teacher read."""

from __future__ import annotations

from cachekd.cache import LogitCache
from cachekd.errors import CachekdError
from cachekd.models import ModelFiles, check_tokenizers
from cachekd.models.fingerprint import reads_otherwise

# Across tokenizers: what a run may say instead of having one tokenizer.
ALIGN = (
    "--align-vocabulary cells compares the two where both have read the same bytes, over classes of tokens; "
    "or "
)


def check_text(cache: LogitCache, model: ModelFiles, whose: str = "student's", instead: str = "") -> None:
    """Refuse a cache of another tokenizer, chat template or way to encode; no data are needed for it.

    Args:
        whose: the model is.
        instead: what else would help, such as `ALIGN`; it comes first.

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
        return f"{instead}give the student the teacher's {name}, or run `cachekd dump` again"
    return f"{instead}name the cache's own teacher, or run `cachekd dump` again"


def require_text_alike(teacher: ModelFiles, student: ModelFiles) -> None:
    """Refuse a pair that is not across tokenizers: the same text has to have the same tokens on both sides.

    Raises:
        CachekdError: what differs, and how.
    """
    check_tokenizers(teacher.processor.tokenizer, student.processor.tokenizer, instead=ALIGN)
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
        fix=ALIGN + "save the teacher's chat_template.jinja beside the student's processor"
        if template
        else f"{ALIGN}the same kind of processor for both",
    )
