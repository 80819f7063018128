"""The demo's models: tiny LLaVAs, with a tokenizer learned from the questions."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # what the examples share

import small_llava

VOCAB_SIZE = 384  # the embedding's; the tokenizer needs fewer, as in many real checkpoints

make_processor = partial(small_llava.make_processor, vocab_size=VOCAB_SIZE)
make_model = partial(small_llava.make_model, vocab_size=VOCAB_SIZE)
