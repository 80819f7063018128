"""What settings and files alike may hold: their largest numbers, and the choices that a manifest repeats."""

from typing import Literal

EXACT = 2**53  # what every JSON reader holds exactly
COUNT = 2**32 - 1  # of whole numbers in settings: numpy's largest seed, and far beyond any count
KEPT = 2**16 - 1  # logprobs of a token, whose number a shard keeps in 16 bits
TooLong = Literal["error", "skip", "cut"]  # what becomes of a sample that is too long
