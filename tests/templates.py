"""Chat templates in the shapes of known families, and their texts put together by hand.

Written from the published shapes; each with a tokenizer of some 400 tokens that has the family's special
tokens, way of splitting and BOS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from cachekd.models.processors import TextProcessor
from tiny import CORPUS

Pieces = list[tuple[str, bool]]  # text, and whether it is supervised
Pairs = list[tuple[str, str]]

QWEN_SYSTEM = "You are a helpful assistant."
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    + QWEN_SYSTEM
    + "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml(system: str | None, pairs: Pairs, image: str) -> Pieces:
    pieces: Pieces = [(f"<|im_start|>system\n{system or QWEN_SYSTEM}<|im_end|>\n", False)]
    for index, (question, answer) in enumerate(pairs):
        picture = "" if index else f"<|vision_start|>{image}<|vision_end|>"
        pieces += [(f"<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n", False)]
        pieces += [(f"{answer}<|im_end|>", True), ("\n", False)]
    return pieces


# Contents are strings; thinking is kept behind the last question only, and an empty block is put there.
QWEN3 = """
{%- if messages[0].role == 'system' %}
  {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
  {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
  {%- if message.content is string %}{%- set content = message.content %}
  {%- else %}{%- set content = '' %}{%- endif %}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
  {%- elif message.role == 'assistant' %}
    {%- set thinking = '' %}
    {%- if '</think>' in content %}
      {%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.last and (loop.last or thinking) %}
      {{- '<|im_start|>assistant\n<think>\n' + thinking.strip('\n') + '\n</think>\n\n' }}
      {{- content.lstrip('\n') }}
    {%- else %}
      {{- '<|im_start|>assistant\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


def qwen3(system: str | None, pairs: Pairs, image: str) -> Pieces:
    pieces: Pieces = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)] if system else []
    for index, (question, answer) in enumerate(pairs):
        think = "<think>\n\n</think>\n\n" if index == len(pairs) - 1 else ""
        pieces += [(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{think}", False)]
        pieces += [(f"{answer}<|im_end|>", True), ("\n", False)]
    return pieces


LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def llama3(system: str | None, pairs: Pairs, image: str) -> Pieces:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    pieces: Pieces = [("<|begin_of_text|>", False)]
    pieces += [(f"{header('system')}{system.strip()}<|eot_id|>", False)] if system else []
    for question, answer in pairs:
        pieces += [(f"{header('user')}{question.strip()}<|eot_id|>{header('assistant')}", False)]
        pieces += [(f"{answer.strip()}<|eot_id|>", True)]
    return pieces


VICUNA_SYSTEM = "A chat between a user and an assistant."
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '" + VICUNA_SYSTEM + "' %}"
    "{% set turns = messages %}{% endif %}{{ system }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] | trim }}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def vicuna(system: str | None, pairs: Pairs, image: str) -> Pieces:
    pieces: Pieces = [(system or VICUNA_SYSTEM, False)]
    for index, (question, answer) in enumerate(pairs):
        picture = "" if index else f"{image}\n"
        pieces += [(f" USER: {(picture + question).strip()} ASSISTANT:", False)]
        pieces += [(f" {answer.strip()}</s>", True)]
    return pieces


# As the Llava 1.5 models on the hub have it: marked, and without an end-of-turn token.
LLAVA15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}"
    "{% endif %}{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] != 'assistant' %}{{ part['text'] + ' ' }}"
    "{% else %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def llava15(system: str | None, pairs: Pairs, image: str) -> Pieces:
    pieces: Pieces = [(f"{system} ", False)] if system else []
    for index, (question, answer) in enumerate(pairs):
        picture = "" if index else f"{image}\n"
        pieces += [(f"USER: {picture}{question} ASSISTANT:", False), (f" {answer}", True), (" ", False)]
    return pieces


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% set turns = messages[1:] %}{% else %}"
    "{% set first = '' %}{% set turns = messages %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}<start_of_turn>{{ role }}\n{{ first if loop.first else '' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% else %}"
    "{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def gemma(system: str | None, pairs: Pairs, image: str) -> Pieces:
    pieces: Pieces = [("<bos>", False)]
    for index, (question, answer) in enumerate(pairs):
        first = "" if index else (f"{system}\n\n" if system else "") + image
        pieces += [(f"<start_of_turn>user\n{first}{question.strip()}<end_of_turn>\n", False)]
        pieces += [("<start_of_turn>model\n", False), (f"{answer.strip()}<end_of_turn>", True), ("\n", False)]
    return pieces


# The system prompt goes to the last question, so that prefixes do not nest.
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{% if system is defined and message == turns | selectattr('role', 'equalto', 'user') | list | last %}"
    "{{ '[INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def mistral(system: str | None, pairs: Pairs, image: str) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for index, (question, answer) in enumerate(pairs):
        before = f"{system}\n\n" if system and index == len(pairs) - 1 else ""
        pieces += [(f"[INST] {before}{question} [/INST]", False), (f" {answer}</s>", True)]
    return pieces


IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def idefics(system: str | None, pairs: Pairs, image: str) -> Pieces:
    pieces: Pieces = [("<|im_start|>", False)]
    pieces += [(f"System: {system}<end_of_utterance>\n", False)] if system else []
    for index, (question, answer) in enumerate(pairs):
        picture = f":{image}" if image and not index else ": "
        pieces += [(f"User{picture}{question}<end_of_utterance>\nAssistant:", False)]
        pieces += [(f" {answer}<end_of_utterance>", True), ("\n", False)]
    return pieces


# <|end|> swallows the line break behind it, and the text ends with another special token.
PHI3 = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def phi3(system: str | None, pairs: Pairs, image: str) -> Pieces:
    pieces: Pieces = [(f"<|system|>\n{system}<|end|>\n", False)] if system else []
    for question, answer in pairs:
        pieces += [(f"<|user|>\n{question}<|end|>\n<|assistant|>\n", False)]
        pieces += [(f"{answer}<|end|>", True), ("\n", False)]
    return [*pieces, ("<|endoftext|>", False)]


@dataclass(frozen=True)
class Shape:
    """A family's template, its text by hand, and its tokenizer.

    Attributes:
        special: its special tokens.
        image: its image token; None for a language model.
        bos: written by the template or, if it does not, by the tokenizer, which always would.
        metaspace: whether the tokenizer splits as SentencePiece does, and not bytes.
    """

    template: str
    by_hand: Callable[[str | None, Pairs, str], Pieces]
    special: tuple[str, ...]
    end: str | None
    image: str | None = None
    bos: str | None = None
    eos: str | None = None
    metaspace: bool = False
    trim_offsets: bool = False
    rstrip: tuple[str, ...] = ()


_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_QWEN_IMAGE = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
SHAPES = {
    "chatml": Shape(CHATML, chatml, (*_CHATML_TOKENS, *_QWEN_IMAGE), "<|im_end|>", image="<|image_pad|>"),
    "qwen3": Shape(QWEN3, qwen3, _CHATML_TOKENS, "<|im_end|>", eos="<|im_end|>"),
    "llama3": Shape(
        LLAMA3,
        llama3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        trim_offsets=True,
    ),
    "vicuna": Shape(
        VICUNA, vicuna, ("<s>", "</s>", "<image>"), "</s>", image="<image>", bos="<s>", metaspace=True
    ),
    "llava15": Shape(
        LLAVA15, llava15, ("<s>", "</s>", "<image>"), None, image="<image>", bos="<s>", metaspace=True
    ),
    "gemma": Shape(
        GEMMA,
        gemma,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        "<end_of_turn>",
        image="<start_of_image>",
        bos="<bos>",
        eos="<eos>",
        metaspace=True,
    ),
    "mistral": Shape(MISTRAL, mistral, ("<s>", "</s>"), "</s>", bos="<s>", metaspace=True),
    "idefics": Shape(
        IDEFICS,
        idefics,
        ("<|im_start|>", "<end_of_utterance>", "<image>"),
        "<end_of_utterance>",
        image="<image>",
        bos="<|im_start|>",
        eos="<end_of_utterance>",
    ),
    "phi3": Shape(
        PHI3,
        phi3,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        eos="<|endoftext|>",
        rstrip=("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
}


def shape_processor(name: str, template: str | None = None) -> Any:
    """The processor of a shape: Llava's for a VLM (16 tokens an image), else the tokenizer alone."""
    shape = SHAPES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer(name)),
        pad_token="<pad>",
        bos_token=shape.bos,
        eos_token=shape.eos or shape.special[1],
    )
    source = template or shape.template
    if shape.image is None:
        tokenizer.chat_template = source
        return TextProcessor(tokenizer)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=shape.image,
        chat_template=source,
    )


@cache
def _tokenizer(name: str) -> str:
    shape = SHAPES[name]
    special = ["<pad>", *shape.special]
    if shape.metaspace:
        # Bytes for what is not in the vocabulary, and "first": a space before the text, as Llama has it.
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        first = name != "gemma"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if first else "never")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        steps += [decoders.Strip(" ", 1, 0)] if first else []
        tokenizer.decoder = decoders.Sequence(steps)
        size, alphabet = 700, []
    else:
        bytes_ = []
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        size, alphabet = 400, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*special, *bytes_], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        [*CORPUS, "USER: ASSISTANT: Assistant: yes. no.\n\n", "a\n\nb\n\n"], trainer
    )
    if bytes_:
        tokenizer = _without_special(tokenizer, bytes_)
    tokenizer.add_special_tokens([AddedToken(token, rstrip=True, special=True) for token in shape.rstrip])
    steps = [processors.ByteLevel(trim_offsets=True)] if shape.trim_offsets else []
    if shape.bos:
        bos = (shape.bos, tokenizer.token_to_id(shape.bos))
        steps.append(processors.TemplateProcessing(single=f"{shape.bos} $A", special_tokens=[bos]))
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer.to_str()


def _without_special(tokenizer: Tokenizer, tokens: list[str]) -> Tokenizer:
    """The trainer can only put tokens in as special ones; the bytes are not to be found in text."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in set(tokens)]
    return Tokenizer.from_str(json.dumps(state))
