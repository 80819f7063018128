"""PaliGemma's layout: images, a question, and the answer as the processor's suffix.

Image and question attend to each other both ways, the answer causally. The token types say which is which,
and only the processor's `suffix` sets them: an answer written into the text would be seen by the question,
and so by the tokens that are to predict it.
"""

from __future__ import annotations

from torch import Tensor

from cachekd.errors import BadSample
from cachekd.samples.processor import Processor
from cachekd.samples.sample import Sample, message_text

LAYOUT = "<image>... <bos>{question}\n{answer}<eos>"


def takes_suffix(processor: Processor) -> bool:
    """Whether answers go into the processor's suffix; a chat template is not used then."""
    # By its name: importing the class takes a second.
    return any(base.__name__ == "PaliGemmaProcessor" for base in type(processor).__mro__)


def suffix_inputs(processor: Processor, sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
    """Encode a sample of one question.

    Returns:
        what the processor makes of it, with a batch axis of one; and [L] bool, the answer with its end token.

    Raises:
        BadSample: not exactly one question and one answer, no image, or tools; the tokens do not give back
            the answer.
    """
    _check(sample)
    [((question,), answer)] = sample.questions
    text = (processor.image_token or "") * len(sample.images) + message_text(question)
    batch = dict(
        processor(
            text=[text],
            images=[list(sample.images)],
            suffix=[answer],
            return_tensors="pt",
            add_special_tokens=False,
        )
    )
    del batch["labels"]  # the supervised mask says the same
    supervised = batch["token_type_ids"][0] == 1
    written = processor.tokenizer.decode(batch["input_ids"][0][supervised])
    if written != answer + processor.tokenizer.eos_token:
        raise BadSample(
            "the supervised tokens do not give back the answer",
            where=sample.where,
            expected=answer + processor.tokenizer.eos_token,
            found=written,
        )
    return batch, supervised


def _check(sample: Sample) -> None:
    roles = [message["role"] for message in sample.messages]
    if roles != ["user", "assistant"] or not sample.images or sample.tools:
        raise BadSample(
            "PaliGemma takes images, one question and one answer",
            where=sample.where,
            expected="a user turn with at least one image, then an assistant turn",
            found=f"{', '.join(roles)} with {len(sample.images)} image(s)"
            + (f" and {len(sample.tools)} tool(s)" if sample.tools else ""),
            fix="one conversation per question, or a teacher of another family",
        )
