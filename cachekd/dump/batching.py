"""How large a new dump's batches are: as it is said, or as a few samples tell and the memory allows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from cachekd.config import DumpConfig
from cachekd.data import Encoded, Samples
from cachekd.data.batches import BatchLimits, limits_said, tokens_like
from cachekd.data.left_out import first_good
from cachekd.data.loader import read_encoded
from cachekd.data.spread import spread
from cachekd.dump.pilot import Pilot
from cachekd.dump.teacher import Teacher
from cachekd.errors import BadSample
from cachekd.models.device import free_memory, reset_peak
from cachekd.models.memory import OutOfMemory

SHARD_TOKENS = 65_536  # about; some 7 MB at 110 bytes per token
# Samples are sorted by length within this many batches: enough that padding is rare, few enough for memory.
BATCHES_PER_SORT = 8
LIKE_SAMPLES = 16  # of the longest: without any setting a batch has at most as many padded tokens
_LOOKED_AT = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """A few samples from all over a data set.

    Attributes:
        longest: of them.
        tokens, answer_tokens: of one, in the mean.
    """

    longest: Encoded
    tokens: float
    answer_tokens: float

    @classmethod
    def at(cls, samples: Samples, teacher: Teacher) -> Look:
        """Read some; bad ones tell nothing.

        Raises:
            CachekdError: none of many can be used.
        """
        places = list(islice(spread(len(samples)), _LOOKED_AT))
        read = read_encoded(samples, teacher.encoder, places, workers=0)
        good = [sample for sample in read if not isinstance(sample, BadSample)]
        if not good:
            good = [first_good(len(samples), lambda index: teacher.encoder(samples[index]), "skip")[1]]
        return cls(
            longest=max(good, key=len),
            tokens=sum(map(len, good)) / len(good),
            answer_tokens=sum(len(sample.token_ids) for sample in good) / len(good),
        )


def fitting(config: DumpConfig, look: Look, teacher: Teacher, run: Callable[[BatchLimits], Pilot]) -> Pilot:
    """Run the pilot in batches as they are said. Where they are not, in as large ones as fit the memory.

    These are found by what needs most, a full batch of the longest sample, and halved until it fits, and
    until all of the pilot's do.

    Args:
        run: the pilot, in such batches.

    Raises:
        OutOfMemory: batches as they are said, or a single sample, do not fit.
    """
    longest = len(look.longest)
    if (said := limits_said(config.batch_size, config.batch_tokens)) is not None:
        said.say_what_runs_alone(longest)
        return run(said)
    tokens = tokens_like(LIKE_SAMPLES, longest)
    while True:
        if teacher.has_room_for([look.longest] * max(1, tokens // longest)):
            try:
                return run(BatchLimits(tokens=tokens))
            except OutOfMemory:
                if tokens == 1:  # every sample by itself
                    raise
        # Here the frames that held the batch's tensors are gone.
        free_memory()
        reset_peak()  # what did not fit is no part of what the dump needs
        tokens //= 2
        log.warning("memory ran out: %s", BatchLimits(tokens=tokens))


def samples_per_group(config: DumpConfig, limits: BatchLimits, look: Look, samples: int) -> int:
    """How many samples are sorted by length together; no shard and no process's share has to be larger.

    Args:
        samples: of the data set.
    """
    if limits.tokens is None:
        assert limits.samples is not None
        return BATCHES_PER_SORT * limits.samples
    in_a_batch = max(1.0, limits.tokens / look.tokens)
    group = BATCHES_PER_SORT * min(in_a_batch, limits.samples or in_a_batch)
    share = -(-samples // config.world_size)
    return max(1, min(round(group), int(SHARD_TOKENS / look.answer_tokens), share))
