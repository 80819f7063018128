"""The example's models: small LLaVAs, with a tokenizer learned from the answers."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # what the examples share

import small_llava

SPREAD = 0.07  # of initial weights, some 1 / sqrt(width): with the usual 0.02 so narrow a model learns late
VOCAB_SIZE = 1024  # most names have several tokens

make_processor = partial(small_llava.make_processor, vocab_size=VOCAB_SIZE)
make_model = partial(small_llava.make_model, vocab_size=VOCAB_SIZE, spread=SPREAD)
