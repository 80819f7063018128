"""Models of different tokenizers are asked the same; what is compared with the teacher is in bytes."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch
from tokenizers import normalizers
from typer.testing import CliRunner

import tokenizer_pairs
from cachekd.config import DumpConfig, EvalConfig, TrainConfig
from cachekd.data import SampleEncoder, collate, open_samples, predicting_positions
from cachekd.dump import dump
from cachekd.errors import CachekdError
from cachekd.evaluate import Evaluation, read_scores, save_in_runs
from cachekd.evaluate.inputs import open_models
from cachekd.evaluate.questions import questions_of
from cachekd.models import load_model, load_processor
from cachekd.train import train
from cachekd_cli.main import app
from caches import of_an_earlier_version
from tiny import (
    ANSWERS,
    CORPUS,
    MARKED_TEMPLATE,
    QUESTIONS,
    evaluated,
    save_vlm,
    tiny_processor,
    write_llava_json,
)
from tokenizer_pairs import STUDENTS, save_pair

CPU = torch.device("cpu")
OTHER_WORDS = "quick brown foxes jump over lazy badgers, while wizards mix vivid pink quartz"
_NEWLINE = "{{ '\\n' }}"
OTHER_END = MARKED_TEMPLATE.replace(f"<|end|>{_NEWLINE}{{% endgen", f"<|system|>{_NEWLINE}{{% endgen")


def longer(**settings):
    """A processor with a vocabulary of over 360 tokens, the last of which are those of the answers."""
    corpus = [OTHER_WORDS] * 9 + [*QUESTIONS, *ANSWERS, *CORPUS]
    return tiny_processor(corpus=corpus, vocab_size=400, **settings)


def permuted(path, source, seed=0):
    """A copy of a model in which every token has another id: it says the same of the same text."""
    shutil.copytree(source, path)
    model, processor = load_model(str(source), dtype=torch.float32, device=CPU), load_processor(str(source))
    order = torch.randperm(len(processor.tokenizer), generator=torch.Generator().manual_seed(seed)).tolist()
    state = json.loads((path / "tokenizer.json").read_text())
    state["model"]["vocab"] = {token: order[old] for token, old in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = order[token["id"]]
    (path / "tokenizer.json").write_text(json.dumps(state))
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[order] = weight[: len(order)].clone()
    for config in (model.config, model.config.text_config, model.generation_config):
        for name in ("image_token_id", "pad_token_id", "eos_token_id"):
            if getattr(config, name, None) is not None:
                setattr(config, name, order[getattr(config, name)])
    model.save_pretrained(path)
    return path


def learned(path, student, data):
    """Some of the answers, so that exact match is neither 0 nor 1."""
    settings = {"lambda_align": 0, "lambda_vsd": 0, "epochs": 16, "batch_size": 4, "learning_rate": 3e-3}
    train(TrainConfig(student=str(student), data=str(data), out=path, **settings))
    return path


@pytest.fixture(scope="module")
def other_path(tmp_path_factory, data_path):
    """A student of a larger vocabulary than the teacher's, whose embedding has no rows for all its ids."""
    processor, folder = longer(), tmp_path_factory.mktemp("models")
    assert len(processor.tokenizer) > 360
    return learned(folder / "run", save_vlm(folder / "other", processor, vocab_size=400, seed=4), data_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student_path, data_path):
    return learned(tmp_path_factory.mktemp("runs") / "trained", student_path, data_path)


def write_text(folder, answers):
    """A question about nothing for each answer."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"from": "human", "value": QUESTIONS[0]}
    records = [
        {"id": f"s{number}", "conversations": [asked, {"from": "gpt", "value": answer}]}
        for number, answer in enumerate(answers)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def dumped(out, teacher, data):
    dump(DumpConfig(teacher=str(teacher), data=str(data), out=out, tail="exact", batch_size=4))
    return str(out)


# ---- exact match


def test_models_of_different_tokenizers_answer_as_each_does_alone(trained, other_path, data_path):
    """Each in its own tokens; the larger vocabulary is not held to the smaller one's embedding rows."""
    together = evaluated([trained, other_path], data_path)
    for score in together.models:
        alone = evaluated([score.name], data_path)
        assert score == alone.models[0]
        assert together.asked == alone.asked
        assert 0 < score.exact_match < 1
    assert {(d.row, d.against) for d in together.differences} >= {(str(other_path), str(trained))}


def test_what_is_too_long_in_one_models_tokens_is_left_out_for_all(tmp_path, student_path, other_path):
    words = OTHER_WORDS.split()
    data = write_text(tmp_path, [" ".join(words[: number + 1]) for number in range(len(words))])
    samples = open_samples(data)
    many, few = (
        [len(SampleEncoder(load_processor(str(path)))(samples[index])) for index in range(len(samples))]
        for path in (student_path, other_path)
    )
    most = sorted(many)[6]
    assert max(few) <= most < max(many)
    for models in ([student_path, other_path], [other_path, student_path]):
        found = evaluated(models, data, max_tokens=most, too_long="skip")
        assert found.asked.left_out.samples == sum(length > most for length in many)
        assert found.asked.fingerprint == evaluated([student_path], data, limit=7).asked.fingerprint


def test_each_tokenizer_has_its_own_limits(tmp_path, student_path, other_path):
    """A short context is that of the models that read in its tokens: others need fewer for the same text."""
    brief = load_model(str(student_path), dtype=torch.float32, device=CPU)
    brief.config.text_config.max_position_embeddings = 64
    brief.save_pretrained(tmp_path / "brief")
    load_processor(str(student_path)).save_pretrained(tmp_path / "brief")
    config = EvalConfig(models=[str(tmp_path / "brief"), str(student_path), str(other_path)], data="d")
    found = [files.limits for files in open_models(config).values()]
    assert [limits.max_tokens for limits in found] == [64, 64, 512]
    assert [limits.embedding_rows for limits in found] == [320, 320, 400]


# ---- agreement and KL


@pytest.mark.parametrize("history", ["none", "full"])
def test_a_copy_with_other_ids_agrees_in_everything(tmp_path, trained, data_path, history):
    copy = permuted(tmp_path / "copy", trained)
    found = evaluated([copy, trained], data_path, teacher=str(trained), history=history)
    cells, plain = found.models
    assert cells.correct == plain.correct == found.teacher.correct
    assert cells.blind.correct == plain.blind.correct
    assert "1" in cells.correct
    assert cells.top1_agreement == plain.top1_agreement == 1.0
    assert cells.kl == pytest.approx(0.0, abs=1e-6)
    assert cells.over_cells.compared == cells.over_cells.tokens
    assert cells.over_cells.differing == 0
    assert plain.over_cells is None


def test_a_copy_of_the_student_with_other_ids_is_as_far_from_the_teacher(
    tmp_path, trained, student_path, data_path
):
    """Over cells that are single tokens, agreement and KL are the plain ones."""
    copy = permuted(tmp_path / "copy", student_path, seed=3)
    plain, cells = evaluated([student_path, copy], data_path, teacher=str(trained)).models
    assert cells.top1_agreement == plain.top1_agreement
    assert cells.kl == pytest.approx(plain.kl, rel=1e-5)
    assert (plain.over_cells, cells.over_cells.compared) == (None, cells.over_cells.tokens)


ALPHABET = {}  # GPT-2's, a character for each byte
_shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
for _byte in range(256):
    ALPHABET[chr(_byte) if _byte in _shown else chr(256 + _byte - sum(b < _byte for b in _shown))] = _byte


class Side:
    """A model's logprobs at the answer tokens of a question, and what its tokens stand for."""

    def __init__(self, path, question):
        model = load_model(str(path), dtype=torch.float32, device=CPU)
        encoder = SampleEncoder(load_processor(str(path)))
        batch = collate([encoder(question)], encoder.pad_token_id)
        supervised = batch.pop("supervised")
        with torch.no_grad():
            logits = model(**batch).logits[predicting_positions(supervised)]
        self.tokenizer, self.end = encoder.processor.tokenizer, encoder.end_of_turn
        self.logprobs = logits[:, : len(self.tokenizer)].double().log_softmax(-1)
        self.spaced = "\N{LOWER ONE EIGHTH BLOCK}a" in self.tokenizer.get_vocab()  # as SentencePiece has it
        added = self.tokenizer.added_tokens_decoder
        self.special = {token for token, one in added.items() if one.special}
        self.contents = [self.content(token) for token in range(len(self.tokenizer))]
        self.ids = batch["input_ids"][supervised].tolist()
        self.texts = [b"" if token == self.end else self.contents[token] for token in self.ids]
        self.blank = self.texts[0][:1] == b" "

    def content(self, token):
        """Bytes of text, or the name of a special token."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if token in self.special:
            return "end" if token == self.end else piece
        if not self.spaced:
            return bytes(ALPHABET[character] for character in piece)
        if piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def first(self, content):
        """The first token that the tokenizer makes of some bytes, without what it does to a text before."""
        if self.spaced:
            written = content.decode(errors="ignore").replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
        else:
            characters = dict(zip(ALPHABET.values(), ALPHABET, strict=True))
            written = "".join(characters[byte] for byte in content)
        return self.contents[self.tokenizer.backend_tokenizer.model.tokenize(written)[0].id]


class View:
    """What a side's tokens stand for at a place.

    Args:
        side: a `Side`.
        leads: whether a blank is still to come there on one side; and whether on this one, so that what
            follows it in a token counts. Then names are nothing that both can say.
    """

    def __init__(self, side, leads, led):
        self.side, self.led = side, led
        self.contents = [
            b"" if leads and isinstance(content, str) else self.behind(content) for content in side.contents
        ]
        self.known = set(self.contents)

    def behind(self, content):
        return content if not self.led else content[1:] if content[:1] == b" " else b""

    def first(self, content):
        return self.behind(self.side.first(b" " * self.led + content))

    def cell(self, content, other):
        """A string or name that both sides have; or where the first token goes that the other has for it."""
        here, there = self, other
        while content and isinstance(content, bytes) and content not in there.known:
            content, here, there = there.first(content), there, here
        return content

    def masses(self, row, other):
        """The probability of each cell."""
        mass = {}
        for content, logprob in zip(self.contents, self.side.logprobs[row].tolist(), strict=True):
            cell = self.cell(content, other)
            mass[cell] = mass.get(cell, 0.0) + math.exp(logprob)
        return mass


def slow_reference(teacher, student, question):
    """Agreement, KL, the student's tokens that have them, and all of these, of one question; by loops."""
    one, other = Side(teacher, question), Side(student, question)
    # Where one side's answer begins with a blank that the other's template wrote, it has read one byte more.
    leads = [one.blank and not other.blank, other.blank and not one.blank]
    agreed, divergence, rows = 0, 0.0, 0
    for theirs, mine in itertools.product(range(len(one.ids)), range(len(other.ids))):
        read = [b"".join(side.texts[:place]) for side, place in ((one, theirs), (other, mine))]
        begins = theirs == mine == 0
        still = any(lead and not text for lead, text in zip(leads, read, strict=True))  # to write the blank
        if not begins and (still or read[0][leads[0] :] != read[1][leads[1] :]):
            continue
        led = [begins and lead for lead in leads]
        a, b = (View(side, any(led), own) for side, own in zip((one, other), led, strict=True))
        cells = a.cell(a.contents[one.ids[theirs]], b), b.cell(b.contents[other.ids[mine]], a)
        if cells[0] != cells[1] or not cells[0]:
            continue
        p, q = a.masses(theirs, b), b.masses(mine, a)
        names = (p.keys() & q.keys()) - {b""}  # what both can say
        p, q = ({name: mass[name] / sum(mass[n] for n in names) for name in names} for mass in (p, q))
        divergence += sum(p[name] * math.log(p[name] / q[name]) for name in names if p[name] > 0)
        agreed += max(p, key=p.get) == max(q, key=q.get)
        rows += 1
    return agreed, divergence, rows, len(other.ids)


def totals_of(teacher, student, data):
    samples = open_samples(data)
    found = [
        slow_reference(teacher, student, question)
        for index in range(len(samples))
        for question in questions_of(samples[index])
    ]
    return (sum(each) for each in zip(*found, strict=True))


@pytest.mark.parametrize("finer", [False, True])
def test_agreement_and_divergence_are_those_of_summed_probabilities(
    tmp_path, trained, other_path, data_path, finer
):
    """A student of longer tokens than the teacher's; and one that spells out the teacher's words."""
    student, data = other_path, write_llava_json(tmp_path, 4)
    if finer:
        finer_path = save_vlm(tmp_path / "finer", tiny_processor(corpus=[OTHER_WORDS] * 9), seed=4)
        student = learned(tmp_path / "run", finer_path, data_path)
    [score] = evaluated([student], data, teacher=str(trained), batch_size=3).models
    agreed, divergence, rows, tokens = totals_of(trained, student, data)
    assert (0 < rows < tokens) if finer else (0 < rows <= tokens)
    assert (score.over_cells.compared, score.over_cells.tokens) == (rows, tokens)
    assert score.top1_agreement == pytest.approx(agreed / rows)
    assert 0 < agreed < rows
    assert score.kl == pytest.approx(divergence / rows, rel=1e-4)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Answers with two turns, among others."""
    folder = save_pair(tmp_path_factory.mktemp("shapes"))
    tokenizer_pairs.write_data(folder / "data", 6)
    return folder


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("swapped", [False, True])
def test_any_shape_of_tokenizer_and_template(shapes, tmp_path, name, swapped):
    """Bytes for what they lack, blanks of the template, other ends; on the teacher's side too."""
    teacher, student = shapes / "teacher", shapes / name
    if swapped:
        teacher, student = student, teacher
    data = tokenizer_pairs.write_data(tmp_path, 3)
    [live] = evaluated([student], data, teacher=str(teacher)).models
    agreed, divergence, rows, tokens = totals_of(teacher, student, data)
    assert (live.over_cells.compared, live.over_cells.tokens) == (rows, tokens)
    assert live.over_cells.differing == 0
    assert live.top1_agreement == pytest.approx(agreed / rows)
    assert live.kl == pytest.approx(divergence / rows, rel=1e-4)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_cache_of_any_shape_of_tokenizer_says_what_the_teacher_would(shapes, tmp_path, name):
    """Its answers are told apart in the teacher's own tokens."""
    data = str(shapes / "data" / "data.json")
    cache = dumped(tmp_path / "cache", shapes / name, data)
    live = evaluated([shapes / "teacher"], data, teacher=str(shapes / name), history="full").models[0]
    cached = evaluated([shapes / "teacher"], data, cache=cache, history="full").models[0]
    assert cached.over_cells == live.over_cells
    assert cached.over_cells.differing == 0
    assert cached.top1_agreement == pytest.approx(live.top1_agreement, abs=0.02)
    assert cached.kl == pytest.approx(live.kl, rel=1e-2)


def test_ids_without_an_embedding_are_in_no_cell(tmp_path, trained):
    """A tokenizer may name more tokens than a model has rows for."""
    processor = tiny_processor(corpus=[OTHER_WORDS] * 9)
    rows = len(processor.tokenizer) - 5
    student = save_vlm(tmp_path / "student", processor, vocab_size=rows, seed=4)
    data = write_text(tmp_path / "data", ["red", "yes", "a large green dog."])
    [score] = evaluated([student], data, teacher=str(trained)).models
    assert score.kl > 0
    [turned] = evaluated([trained], data, teacher=str(student)).models
    assert turned.kl > 0
    assert turned.over_cells.compared == score.over_cells.compared


def test_batches_change_nothing(trained, other_path, data_path):
    one, many = (
        evaluated([other_path], data_path, teacher=str(trained), batch_size=size).models[0] for size in (1, 7)
    )
    assert one.correct == many.correct
    assert one.over_cells == many.over_cells
    assert one.top1_agreement == many.top1_agreement
    assert one.kl == pytest.approx(many.kl, rel=1e-4)


def test_another_end_of_the_answer_is_another_token_for_the_same(tmp_path, trained, data_path):
    """One tokenizer, two templates: the two ends are one cell, all else is the same."""
    model, processor = load_model(str(trained), dtype=torch.float32, device=CPU), load_processor(str(trained))
    processor.chat_template = processor.tokenizer.chat_template = OTHER_END
    model.save_pretrained(tmp_path / "brief")
    processor.save_pretrained(tmp_path / "brief")
    [score] = evaluated([tmp_path / "brief"], data_path, teacher=str(trained)).models
    assert score.over_cells.compared == score.over_cells.tokens
    # It has not learned this end, but says of all other tokens what the teacher does.
    [same] = evaluated([trained], data_path, teacher=str(trained)).models
    assert 0.5 < score.top1_agreement < same.top1_agreement
    assert score.correct.count("1") == 0 < same.correct.count("1")


def test_answers_of_other_bytes_are_counted_and_named(tmp_path, teacher_path):
    """A tokenizer that makes one letter of a ligature does not say the same as one that keeps it."""
    processor = longer()
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    student = save_vlm(tmp_path / "student", processor, vocab_size=400, seed=4)
    data = write_text(tmp_path / "data", ["yes", "\N{LATIN SMALL LIGATURE FI}ve", "a large green dog."])
    whole = evaluated([student], data, teacher=str(teacher_path))
    [score] = whole.models
    assert len(score.correct) == whole.asked.questions == 3
    assert score.over_cells.differing == 1
    [(name, why)] = score.over_cells.first.items()
    assert name == "s1, question 1"
    assert "bytes" in why or "byte" in why
    rest = write_text(tmp_path / "rest", ["yes", "a large green dog."])
    [alone] = evaluated([student], rest, teacher=str(teacher_path)).models
    assert score.over_cells.compared == alone.over_cells.compared
    assert (score.top1_agreement, score.kl) == (alone.top1_agreement, alone.kl)

    only = write_text(tmp_path / "only", ["\N{LATIN SMALL LIGATURE FI}ve"])
    [nothing] = evaluated([student], only, teacher=str(teacher_path)).models
    assert (nothing.top1_agreement, nothing.kl, nothing.agrees_with) == (None, None, str(teacher_path))
    assert (nothing.over_cells.compared, nothing.over_cells.differing) == (0, 1)


# ---- a cache in the teacher's place


@pytest.mark.parametrize("history", ["none", "full"])
def test_a_cache_says_what_the_teacher_would(tmp_path, trained, other_path, data_path, history):
    """Also of conversations, whose answers are told apart in the teacher's tokens."""
    data = data_path if history == "full" else write_llava_json(tmp_path / "single", 6)
    if history == "none":
        records = json.loads(data.read_text())
        for record in records:
            record["conversations"] = record["conversations"][:2]
        # A second answer in a row, that nobody asks for.
        records[1]["conversations"].append({"from": "gpt", "value": "and more"})
        data.write_text(json.dumps(records))
    cache = dumped(tmp_path / "cache", trained, data)
    live = evaluated([other_path], data, teacher=str(trained), history=history)
    cached = evaluated([other_path], data, cache=cache, history=history)
    assert cached.asked == live.asked
    [ours], [theirs] = cached.models, live.models
    assert ours.over_cells == theirs.over_cells
    assert ours.top1_agreement == theirs.top1_agreement
    assert ours.kl == pytest.approx(theirs.kl, abs=2e-3)
    assert ours.kl > 0.01


def test_a_cache_of_other_data_is_refused(tmp_path, teacher_path, other_path):
    cache = dumped(tmp_path / "cache", teacher_path, write_text(tmp_path / "data", ["red", "yes"]))
    changed = write_text(tmp_path / "changed", ["red", "no"])
    with pytest.raises(CachekdError, match="the sample's text or image differs"):
        evaluated([other_path], changed, cache=cache)


def test_of_an_older_cache_the_teachers_tokenizer_says_what_its_ids_are(tmp_path, trained, other_path):
    data = write_text(tmp_path / "data", ["red", "yes", "a large green dog."])
    cache = dumped(tmp_path / "cache", trained, data)
    whole = evaluated([other_path], data, cache=cache).models
    assert evaluated([other_path], data, cache=of_an_earlier_version(cache)).models == whole
    nowhere = of_an_earlier_version(dumped(tmp_path / "nowhere", trained, data), name="models/gone")
    with pytest.raises(CachekdError, match=r"does not say what its token ids stand for[\s\S]*--teacher"):
        evaluated([other_path], data, cache=nowhere)
    assert evaluated([trained], data, cache=nowhere).models[0].over_cells is None


# ---- what is said of it


def test_scores_say_that_they_are_over_cells(trained, teacher_path, other_path, data_path):
    words = ["eval", str(other_path), str(teacher_path), "--teacher", str(trained)]
    done = CliRunner().invoke(app, [*words, "--data", str(data_path)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    [found] = [scores for scores in read_scores(other_path) if scores.models[0].kl is not None]
    cells = found.models[0].over_cells
    said = f"over cells, at {cells.compared} of {cells.tokens} answer tokens"
    assert said in " ".join(done.output.split())
    assert done.output.count("(over cells)") == 1
    # What is kept of an earlier evaluation is kept with it.
    evaluated_again = evaluated([other_path], data_path)
    save_in_runs(evaluated_again)
    [kept] = [scores for scores in read_scores(other_path) if scores.asked == evaluated_again.asked]
    assert kept.models[0].over_cells == cells
    assert kept.models[0].kl == found.models[0].kl
    assert Evaluation.model_validate_json(kept.model_dump_json()) == kept
