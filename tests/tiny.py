"""Tiny but whole VLMs, processors and data sets for the tests; random weights, real classes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from cachekd.errors import CachekdError

MARKED_TEMPLATE = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
    "<|assistant|>\n{% generation %}{{ m['content'][0]['text'] }}<|end|>\n{% endgeneration %}"
    "{%- else -%}<|{{ m['role'] }}|>\n"
    "{%- for p in m['content'] -%}{{ '<image>' if p['type'] == 'image' else p['text'] }}{%- endfor -%}"
    "<|end|>\n"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>\n{%- endif -%}"
)
# jinja's "-%}" would eat the newlines that a template author wrote; keep them as text.
MARKED_TEMPLATE = MARKED_TEMPLATE.replace("|>\n", "|>{{ '\\n' }}")
PLAIN_TEMPLATE = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")

CORPUS = [
    "what is the color of the shape? red",
    "is there a blue circle? yes no",
    "describe: a large green dog.",
]


ANSWERED = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}]


def plain_error(caught: Any) -> str:
    """The text of an error that is the data set's, not a sample's."""
    assert type(caught.value) is CachekdError
    return str(caught.value)


def tiny_processor(
    *,
    template: str = MARKED_TEMPLATE,
    patch_size: int = 8,
    class_token: bool = True,
    corpus: list[str] | None = None,
    vocab_size: int = 320,
) -> LlavaProcessor:
    """A LlavaProcessor for 32 x 32 images with a byte-level BPE tokenizer of some 300 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<image>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus or CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<|end|>", additional_special_tokens=special[1:5]
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default" if class_token else "full",
        num_additional_image_tokens=1 if class_token else 0,
        image_token="<image>",
        chat_template=template,
    )


def tiny_vlm(
    processor: LlavaProcessor,
    *,
    tower: str = "clip",
    vision_layers: int = 2,
    vision_width: int = 32,
    text_width: int = 32,
    feature_layer: int = -1,
    patch_size: int = 8,
    vocab_size: int = 320,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """A Llava with random weights, in eval mode."""
    vision_class = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    vision = vision_class(
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=32,
        patch_size=patch_size,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.tokenizer.convert_tokens_to_ids(processor.image_token),
        image_seq_length=(32 // patch_size) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


def save_vlm(path: Path, processor: LlavaProcessor, **kwargs: Any) -> Path:
    """Write a tiny VLM and its processor as a model folder."""
    tiny_vlm(processor, **kwargs).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def noise_image(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_bytes(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


QUESTIONS = ["what is the color?", "is there a dog?", "describe:", "what is the shape of the large circle?"]
ANSWERS = ["red", "yes", "a large green dog.", "no"]


def conversation(seed: int, turns: int = 2) -> list[dict[str, str]]:
    turn_list = []
    for turn in range(turns):
        question = QUESTIONS[(seed + turn) % len(QUESTIONS)]
        turn_list.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
        turn_list.append({"from": "gpt", "value": ANSWERS[(seed * 3 + turn) % len(ANSWERS)]})
    return turn_list


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar with exactly these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def tar_members(count: int, *, start: int = 0) -> list[tuple[str, bytes]]:
    """Members of `count` good samples with 1 to 3 turns."""
    members = []
    for index in range(start, start + count):
        record = {"conversations": conversation(index, 1 + index % 3)}
        members.append((f"s{index:03d}.png", png_bytes(noise_image(index))))
        members.append((f"s{index:03d}.json", json.dumps(record).encode()))
    return members


def unequal_members(count: int) -> list[tuple[str, bytes]]:
    """Answers of 1 to 60 words, 1 to 3 turns."""
    members = []
    for index in range(count):
        turns = []
        for turn in range(1 + index % 3):
            question = QUESTIONS[(index + turn) % len(QUESTIONS)]
            answer = " ".join(["green dog"] * (1 + (index * 7 + turn * 11) % 30))
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        members.append((f"u{index:03d}.png", png_bytes(noise_image(index))))
        members.append((f"u{index:03d}.json", json.dumps({"conversations": turns}).encode()))
    return members


def write_llava_json(folder: Path, count: int) -> Path:
    """A LLaVA-style JSON file with its images."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        noise_image(index).save(folder / f"{index}.png")
        records.append({"id": f"s{index:03d}", "image": f"{index}.png", "conversations": conversation(index)})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def evaluated(models, data, progress=None, **settings):
    """`evaluate` by its settings."""
    from cachekd.config import EvalConfig
    from cachekd.evaluate.run import evaluate

    config = EvalConfig(models=[str(model) for model in models], data=data, **settings)
    return evaluate(config) if progress is None else evaluate(config, progress)


def checked(teacher, student, data, **settings):
    """`check_pair` by its settings; of data, their name or their options."""
    from cachekd.check import check_pair
    from cachekd.config import CheckConfig, DataOptions

    said = data.model_dump(exclude_unset=True) if isinstance(data, DataOptions) else {"data": str(data)}
    return check_pair(CheckConfig(teacher=str(teacher), student=str(student), **said | settings))


def with_long_ones(folder: Path, count: int, long: tuple[int, ...]) -> Path:
    """A LLaVA file in which some of `count` samples have an answer of over 1,000 tokens."""
    path = write_llava_json(folder, count)
    records = json.loads(path.read_text())
    for index in long:
        records[index]["conversations"][1]["value"] = "red and blue, " * 200 + "or so"
    path.write_text(json.dumps(records))
    return path
