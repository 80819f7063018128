"""Image-text conversations in, model inputs and a supervised mask out."""

from cachekd.samples.encode import Encoded, SampleEncoder, collate, predicting_positions
from cachekd.samples.limits import Limits
from cachekd.samples.open import open_samples
from cachekd.samples.outline import Outline
from cachekd.samples.protocol import Samples
from cachekd.samples.reader import read_encoded
from cachekd.samples.records import sample_from_llava, sample_from_record
from cachekd.samples.sample import Sample
from cachekd.samples.survey import Survey, rough_lengths, survey

__all__ = [
    "Encoded",
    "Limits",
    "Outline",
    "Sample",
    "SampleEncoder",
    "Samples",
    "Survey",
    "collate",
    "open_samples",
    "predicting_positions",
    "read_encoded",
    "rough_lengths",
    "sample_from_llava",
    "sample_from_record",
    "survey",
]
