"""Image-text conversations in, model inputs and a supervised mask out."""

from cachekd.data.collate import collate, predicting_positions
from cachekd.data.encode import Encoded, SampleEncoder
from cachekd.data.limits import Limits
from cachekd.data.loader import read_encoded
from cachekd.data.open import open_samples
from cachekd.data.records import sample_from_llava, sample_from_record
from cachekd.data.sample import Sample, Samples
from cachekd.data.survey import Survey, rough_lengths, survey

__all__ = [
    "Encoded",
    "Limits",
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
