"""The demo's models: tiny LLaVAs, with a tokenizer learned from the questions; or another one."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from transformers import LlavaProcessor

sys.path.append(str(Path(__file__).parents[1]))  # what the examples share

import small_llava

from data import questions_by_image  # isort: skip

VOCAB_SIZE = 384  # the embedding's; the tokenizer needs fewer, as in many real checkpoints

make_processor = partial(small_llava.make_processor, vocab_size=VOCAB_SIZE)
make_model = partial(small_llava.make_model, vocab_size=VOCAB_SIZE)

# As SmolVLM writes a chat: an answer begins with a blank.
PIECES = small_llava.Markup(
    template=Path(__file__).parent / "chat_template_pieces.jinja",
    special_tokens=("<|endoftext|>", "<|im_start|>", "<image>", "<end_of_utterance>"),
    first="<|im_start|>User: ",
    user="\nUser: ",
    assistant="<end_of_utterance>\nAssistant:",
    blank=" ",
)
LONGEST_PIECE = 6  # bytes, a blank before a word included


def make_pieces_processor() -> LlavaProcessor:
    """A processor with another tokenizer and another chat template than the teacher's.

    Its tokenizer learns from the training questions and answers too, and has no token of more than
    `LONGEST_PIECE` bytes: it cuts "rectangle" into " re", "cta" and "ngle".
    """
    chats = (
        f"User: {question}\nAssistant: {answer}"
        for pairs in questions_by_image("train").values()
        for question, answer in pairs
    )
    return make_processor(chats, markup=PIECES, longest=LONGEST_PIECE)
