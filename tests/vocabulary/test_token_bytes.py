"""What tokens stand for: of every kind of tokenizer, joined they are the text that it decodes them to."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cachekd.errors import CachekdError
from cachekd.vocabulary import TokenBytes
from caches import ROOT
from tiny import tiny_processor
from vocabularies import fast, vocabulary

TEXTS = ["A red square, and a dog; is it?", "three red dogs", "naïve 日本 🐶", "a  b\n\n\tc = 3.14"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    bpe.add_tokens(["<think>"])
    bpe.add_special_tokens(["<|end|>"])
    return bpe


def sentencepiece(*, prefix: bool = True) -> Tokenizer:
    """As Llama-2's: characters, pairs, and bytes of what it does not know; and Gemma's added blanks."""
    pieces = ["<unk>", "</s>", *BYTES, "▁r", "ed", "▁red", *"▁aredogshtn日"]
    merges = [("▁", "r"), ("e", "d"), ("▁r", "ed")]
    bpe = Tokenizer(
        models.BPE(
            {piece: n for n, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    begin = [normalizers.Prepend("▁")] if prefix else []
    bpe.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    bpe.decoder = decoders.Sequence(steps)
    bpe.add_tokens(["▁▁"])
    bpe.add_special_tokens(["<unk>", "</s>"])
    return bpe


def metaspace() -> Tokenizer:
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>"))
    return unigram


def wordpiece() -> Tokenizer:
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    words.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"]))
    return words


def of_words() -> Tokenizer:
    """Whole words, which are joined with blanks: there is no decoder."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return words


def with_suffix() -> Tokenizer:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.decoder = decoders.BPEDecoder()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=60, end_of_word_suffix="</w>"))
    return bpe


def demo() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "examples" / "easy_vqa" / "student" / "tokenizer.json"))


ALL = [byte_level, sentencepiece, metaspace, wordpiece, of_words, with_suffix, demo]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_a_text_stand_for_what_they_are_decoded_to(make, text):
    """Blanks before the first word are the tokenizer's own; special tokens, as of unknown words, no text."""
    tokenizer = make()
    tokens = TokenBytes.of(fast(tokenizer), None)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    joined = b"".join(tokens.contents[number] for number in ids if number not in tokens.special)
    assert joined.decode().strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert ids


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_byte_level_tokens_joined_are_the_very_text(text):
    tokenizer = tiny_processor().tokenizer
    tokens = TokenBytes.of(tokenizer, None)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(tokens.contents[number] for number in ids) == text.encode()


def test_blanks_and_bytes_of_sentencepiece():
    tokenizer = sentencepiece()
    tokens = TokenBytes.of(fast(tokenizer), 1)
    of = {piece: tokens.contents[number] for piece, number in tokenizer.get_vocab().items()}
    assert of["▁red"] == b" red"
    assert of["▁▁"] == b"  "  # an added token, and no special one
    assert of["日"] == "日".encode()
    assert [of[piece] for piece in BYTES] == [bytes([byte]) for byte in range(256)]
    assert of["</s>"] == b"</s>"
    assert tokens.special == {0, 1}


def test_an_added_token_of_a_byte_level_tokenizer_is_plain_text():
    """It is not written in the alphabet, in which ï is the byte 0xEF, though the library decodes it so."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("naïve", normalized=False)])
    tokens = TokenBytes.of(fast(tokenizer), None)
    ids = tokenizer.encode("naïve").ids
    assert [tokens.contents[number] for number in ids] == ["naïve".encode()]
    assert tokens.contents[tokenizer.token_to_id("<think>")] == b"<think>"
    assert tokens.special == {tokenizer.token_to_id("<|end|>")}


def test_the_token_that_ends_a_turn_is_a_name_even_if_the_tokenizer_says_otherwise():
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<think>")
    tokens = TokenBytes.of(fast(tokenizer), end)
    assert end in tokens.special
    assert tokens.end_of_turn == end


def test_ids_without_a_token_stand_for_nothing():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a"))
    tokens = TokenBytes.of(fast(tokenizer), None)
    assert tokens.contents == (b" a", b"", b"", b" b")
    assert len(tokens) == 4


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(CachekdError, match="does not say which bytes") as caught:
        TokenBytes.of(SimpleNamespace(name_or_path="org/slow"), None)
    assert "org/slow" in str(caught.value)


def test_a_decoder_that_cannot_be_read_is_refused_by_its_name():
    tokenizer = of_words()
    tokenizer.decoder = decoders.CTC()
    with pytest.raises(CachekdError, match="found: CTC"):
        TokenBytes.of(fast(tokenizer), None)
    tokenizer.decoder = decoders.Replace(Regex("a+"), "b")
    with pytest.raises(CachekdError, match="found: Replace with a regular expression"):
        TokenBytes.of(fast(tokenizer), None)


def test_a_decoder_that_does_more_than_it_seems_to_is_refused():
    """Strip behind Fuse takes away a blank before the text; before Fuse, of each token."""
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    with pytest.raises(CachekdError, match="cannot be told which bytes"):
        TokenBytes.of(fast(tokenizer), None)


def test_the_fingerprint_covers_all_of_it_and_where_one_token_ends():
    tokens = vocabulary(b"ab", b"c", "<end>", end=2)
    same = vocabulary(b"ab", b"c", "<end>", end=2)
    others = [
        vocabulary(b"a", b"bc", "<end>", end=2),
        vocabulary(b"ab", b"c", b"<end>", end=2),
        vocabulary(b"ab", b"c", "<end>"),
        vocabulary(b"ab", b"c", "<end>", b"", end=2),
        dataclasses.replace(tokens, special=frozenset({1, 2})),
    ]
    assert tokens.fingerprint == same.fingerprint
    assert len({tokens.fingerprint, *(other.fingerprint for other in others)}) == 6
