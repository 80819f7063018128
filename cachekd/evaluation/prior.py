"""How far one gets without looking: by what is answered most often."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from cachekd.config.data import OnError
from cachekd.data import Samples
from cachekd.data.left_out import may_be_left_out
from cachekd.errors import BadSample, CachekdError
from cachekd.evaluation.questions import one_line, question_type


class AnswerPrior:
    """Answers a question by what was answered most often to the same question; to one that never came, by
    what was answered most often to those of its type; and else by the most frequent answer of all. Of equally
    frequent ones the first in the alphabet.

    Args:
        seen: questions and their answers.
    """

    def __init__(self, seen: Iterable[tuple[str, str]]) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for text, answer in seen:
            for name in _names(text):
                counts[name][answer.strip()] += 1
        self._answers = {
            name: min(counter, key=lambda answer: (-counter[answer], answer))
            for name, counter in counts.items()
        }

    def answer(self, text: str) -> str:
        """To a question; "" where nothing was seen at all."""
        return next((self._answers[name] for name in _names(text) if name in self._answers), "")


def _names(text: str) -> tuple[str, str, str]:
    """What a question counts as, the closest first; a type and a question may be the same words."""
    question = one_line(text)
    return f"question {question}", f"type {question_type(question)}", "all"


def prior_of(
    samples: Samples, where: str, on_error: OnError, progress: Callable[[int], None]
) -> tuple[AnswerPrior, int]:
    """From a whole data set, no picture of which is opened.

    Args:
        where: the data set.
        on_error: whether a record that cannot be read stops, or counts for nothing.
        progress: is told of records since the last call.

    Returns:
        the prior, and the number of records that gave it nothing: none of their answers follows a question.

    Raises:
        CachekdError: the data set or a record cannot be read, or no record gave anything.
    """
    seen: list[tuple[str, str]] = []
    nothing = 0
    for index in range(len(samples)):
        found = _answered(samples, index, on_error)
        seen += found
        nothing += not found
        progress(1)
    if not seen:
        raise CachekdError(
            "nothing is asked and answered in the data of the prior",
            where=where,
            expected="records with a user's turn and an answer to it",
            found=f"{nothing:,} others",
            fix="name the training data, --prior-data; they are read as --data is (--map, --key)",
        )
    return AnswerPrior(seen), nothing


def _answered(samples: Samples, index: int, on_error: OnError) -> Sequence[tuple[str, str]]:
    try:
        return samples.outline(index).answered
    except BadSample as error:
        if not may_be_left_out(error, on_error):
            raise
        return ()
