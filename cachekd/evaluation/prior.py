"""How far one gets without looking: by what is answered most often."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from cachekd.errors import BadSample
from cachekd.evaluation.questions import one_line, question_type
from cachekd.samples import Samples


class AnswerPrior:
    """Answers a question by what was answered most often to the same question; to one that never came, by
    what was answered most often to those of its type; and else by the most frequent answer of all.

    Args:
        seen: questions and their answers.
    """

    def __init__(self, seen: Iterable[tuple[str, str]]) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for text, answer in seen:
            question = one_line(text)
            # A type has two words at most, a question may too: they are told apart by what comes before.
            for name in (f"question {question}", f"type {question_type(question)}", "all"):
                counts[name][answer.strip()] += 1
        self._answers = {name: counter.most_common(1)[0][0] for name, counter in counts.items()}

    @classmethod
    def of(cls, samples: Samples) -> AnswerPrior:
        """From a whole data set, no picture of which is opened; records that cannot be read count for
        nothing.

        Raises:
            CachekdError: the data set cannot be read.
        """
        return cls(pair for index in range(len(samples)) for pair in _pairs(samples, index))

    def answer(self, text: str) -> str:
        """To a question; "" where nothing was seen at all."""
        question = one_line(text)
        names = (f"question {question}", f"type {question_type(question)}", "all")
        return next((self._answers[name] for name in names if name in self._answers), "")


def _pairs(samples: Samples, index: int) -> tuple[tuple[str, str], ...]:
    try:
        return samples.outline(index).answered
    except BadSample:
        return ()
