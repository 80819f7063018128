"""Image-text conversations in, model inputs and a supervised mask out."""

from cachekd.samples.encode import Encoded, SampleEncoder, collate, predicting_positions
from cachekd.samples.open import Samples, open_samples
from cachekd.samples.sample import Sample, sample_from_llava

__all__ = [
    "Encoded",
    "Sample",
    "SampleEncoder",
    "Samples",
    "collate",
    "open_samples",
    "predicting_positions",
    "sample_from_llava",
]
