"""A model's own answers: those of greedy decoding written out, for every family, alone and in batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cachekd.data import Limits, Sample
from cachekd.data.batches import BatchLimits
from cachekd.data.encode import PER_TOKEN
from cachekd.errors import BadSample
from cachekd.lmms.answer import Answer, Answerer, Generation
from cachekd.models import ModelFiles
from family_samples import TALL, TEXT, TWO, WIDE, every_family
from tiny_families import FAMILIES, save

NEW = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp("families") / family, family)
        return made[family]

    return folder


def opened(folder, **limits) -> Answerer:
    files = ModelFiles(folder)
    model = files.load(dtype=torch.float32, device=CPU)
    return Answerer(model, files, **limits)


def asked(sample: Sample) -> Sample:
    """The sample's first question, without its answer."""
    return replace(sample, messages=sample.messages[:1])


@torch.no_grad()
def greedy(answerer: Answerer, sample: Sample) -> list[int]:
    """Token by token, each with a forward over all that stands before it: no cache, no padding."""
    encoded = answerer.encoder.prompt(sample)
    # Gemma 3's 1 is an image; PaliGemma's is an answer, each token of which sees what is before it alone.
    kind = int(answerer.model.config.model_type == "paligemma")
    inputs = {name: x[None] if name in PER_TOKEN else x for name, x in encoded.inputs.items()}
    written: list[int] = []
    while len(written) < NEW:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        token = int(answerer.model(**inputs).logits[0, -1].argmax())
        if token in answerer.stops:
            break
        written.append(token)
        for name in set(PER_TOKEN) & set(inputs):
            last = inputs[name][:, -1:]
            value = {"input_ids": token, "token_type_ids": kind, "attention_mask": 1}.get(name, 0)
            more = torch.full_like(last, value)
            inputs[name] = torch.cat([inputs[name], more], 1)
    return written


@every_family
def test_an_answer_is_that_of_greedy_decoding_alone_and_beside_others(family, folders):
    samples = [asked(WIDE), asked(TALL), asked(TWO)]
    if "text-only sample" not in FAMILIES[family].refuses:
        samples.append(asked(TEXT))
    one = opened(folders(family), limits=BatchLimits(samples=1))
    expected = [greedy(one, sample) for sample in samples]
    tokenizer = one.encoder.processor.tokenizer
    texts = [
        Answer(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), len(ids))
        for ids in expected
    ]
    assert len(set(map(tuple, expected))) > 1  # they look at what they are asked
    prompts = [one.encoder.prompt(sample) for sample in samples]
    told: list[int] = []
    assert one.answer(prompts, Generation(NEW), told.append) == texts
    assert sum(told) == len(samples)
    several = opened(folders(family), limits=BatchLimits(samples=3))
    assert several.answer(prompts, Generation(NEW)) == texts


def test_a_prompt_is_what_training_has_before_the_answer(folders):
    for family in FAMILIES:
        encoder = ModelFiles(folders(family)).encoder
        whole, prompt = encoder(WIDE), encoder.prompt(asked(WIDE))
        before = int(whole.supervised.nonzero()[0])
        assert prompt.inputs["input_ids"].tolist() == whole.inputs["input_ids"][:before].tolist(), family
        assert not prompt.supervised.any()
        for name in prompt.inputs.keys() - set(PER_TOKEN):
            assert torch.equal(prompt.inputs[name], whole.inputs[name]), (family, name)


def test_what_a_checkpoint_says_of_sampling_is_not_followed(folders):
    answerer = opened(folders("llava"))
    config = answerer.model.generation_config
    assert (config.do_sample, config.repetition_penalty, config.temperature) in (
        (None, None, None),
        (False, 1.0, 1.0),
    )


def test_a_prompt_that_leaves_no_room_for_an_answer_is_named(folders):
    files = ModelFiles(folders("llava"))
    length = len(files.encoder.prompt(asked(WIDE)))
    for most, problem in ((length, "the context has no room"), (length - 1, "too long")):
        within = files.within(Limits(max_tokens=most))
        answerer = Answerer(within.load(dtype=torch.float32, device=CPU), within)
        try:
            [found] = answerer.answer([answerer.encoder.prompt(asked(WIDE))], Generation(NEW))
        except BadSample as error:
            found = error
        assert isinstance(found, BadSample)
        assert problem in str(found)


def test_an_answer_ends_with_the_context(folders):
    files = ModelFiles(folders("llava"))
    length = len(files.encoder.prompt(asked(WIDE)))
    within = files.within(Limits(max_tokens=length + 2))
    answerer = Answerer(within.load(dtype=torch.float32, device=CPU), within)
    answerer.model.generation_config.eos_token_id = None
    answerer.stops = []
    [found] = answerer.answer([answerer.encoder.prompt(asked(WIDE))], Generation(NEW))
    assert found.tokens == 2


@pytest.mark.parametrize("beams", [1, 2])
def test_a_short_prompt_beside_a_long_one_has_its_own_room(folders, beams):
    files = ModelFiles(folders("llava"))
    short, long = (files.encoder.prompt(asked(sample)) for sample in (TALL, TWO))
    assert len(short) < len(long)
    within = files.within(Limits(max_tokens=len(long) + 2))
    answerer = Answerer(within.load(dtype=torch.float32, device=CPU), within)
    answerer.model.generation_config.eos_token_id = None
    answerer.stops = []
    found = answerer.answer([long, short], Generation(NEW, beams))
    assert [answer.tokens for answer in found] == [2, min(NEW, len(long) + 2 - len(short))]
    assert found[1] == answerer.answer([short], Generation(NEW, beams))[0]


def test_control_tokens_in_a_question_are_refused(folders):
    encoder = ModelFiles(folders("llava")).encoder
    sample = asked(TEXT)
    turn = {"role": "user", "content": [{"type": "text", "text": "what is <image> here?"}]}
    with pytest.raises(BadSample, match="control token"):
        encoder.prompt(replace(sample, messages=(turn,)))
