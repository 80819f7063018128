"""TinyLLaVA's sizes with random weights, made in memory: models, their processor, and a data set for them.

No model of these sizes can be had without a hub, and none is needed to measure time and memory: what counts
are the shapes. The tokenizer has as many words as Qwen2.5 has rows; every sample has the same length.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from cachekd.models import ModelFiles

SPECIAL = ["<pad>", "<unk>", "<image>", "<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
    "<assistant> {% generation %}{{ m['content'][0]['text'] }} <end> {% endgeneration %}"
    "{%- else -%}<user> "
    "{%- for p in m['content'] -%}{{ '<image>' if p['type'] == 'image' else p['text'] }}{%- endfor -%}"
    " <end> "
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<assistant> {%- endif -%}"
)
OPINION = 4.0  # random heads are scaled by it: else all logits are much the same
PICTURES = 16  # different ones


@dataclass(frozen=True)
class Tower:
    """A SigLIP encoder, the same in both models, as the switch needs it."""

    layers: int
    width: int
    inner: int
    heads: int
    image: int
    patch: int

    @property
    def tokens(self) -> int:
        """Per picture."""
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class Text:
    """A Qwen2 language model; embeddings and head are one matrix."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Sizes:
    """Of both models and the data.

    Attributes:
        question, answer: words of each sample; the template adds four tokens, one of them the answer's end.
        samples: of the data set.
        dump_batch, step_batch: samples per forward of the dump, per training step whose time counts.
        peak_batch: samples per training step whose memory counts.
        matmul: rows of the square matrices whose product tells the card's rate.
        rows: answer tokens at which single operations are timed.
    """

    vocab: int
    tower: Tower
    teacher: Text
    student: Text
    question: int
    answer: int
    samples: int
    dump_batch: int
    step_batch: int
    peak_batch: int
    matmul: int
    rows: int


SIZES = {
    "tinyllava": Sizes(
        vocab=151_936,
        tower=Tower(layers=27, width=1152, inner=4304, heads=16, image=384, patch=14),
        teacher=Text(layers=36, width=2048, inner=11_008, heads=16, kv_heads=2),
        student=Text(layers=24, width=896, inner=4864, heads=14, kv_heads=2),
        question=127,
        answer=119,
        samples=512,
        dump_batch=16,
        step_batch=8,
        peak_batch=4,
        matmul=8192,
        rows=480,
    ),
    "tiny": Sizes(
        vocab=512,
        tower=Tower(layers=2, width=32, inner=64, heads=2, image=28, patch=14),
        teacher=Text(layers=2, width=64, inner=128, heads=4, kv_heads=2),
        student=Text(layers=1, width=32, inner=64, heads=2, kv_heads=1),
        question=6,
        answer=9,
        samples=64,
        dump_batch=2,
        step_batch=2,
        peak_batch=2,
        matmul=64,
        rows=24,
    ),
}


def processor_of(sizes: Sizes) -> LlavaProcessor:
    """One word a token, `sizes.vocab` of them."""
    words = [*SPECIAL, *(f"w{number}" for number in range(sizes.vocab - len(SPECIAL)))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": sizes.tower.image, "width": sizes.tower.image}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            eos_token="<end>",
            additional_special_tokens=SPECIAL[2:5],
        ),
        patch_size=sizes.tower.patch,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def config_of(sizes: Sizes, text: Text) -> LlavaConfig:
    """A Llava as TinyLLaVA puts it together."""
    tower = sizes.tower
    return LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=tower.width,
            intermediate_size=tower.inner,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.image,
            patch_size=tower.patch,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=sizes.vocab,
            hidden_size=text.width,
            intermediate_size=text.inner,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            tie_word_embeddings=True,
        ),
        image_token_id=SPECIAL.index("<image>"),
        image_seq_length=tower.tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


@torch.inference_mode(False)
@torch.no_grad()
def random_model(
    config: LlavaConfig, *, dtype: torch.dtype, device: torch.device, seed: int
) -> torch.nn.Module:
    """Made where it is to run: nothing is written to a disk, read or copied.

    The last norm lets few directions of the final states count much, as in trained models: a tail sketch has
    some 200 axes, not all of them.
    """
    torch.manual_seed(seed)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.get_output_embeddings().weight *= OPINION
    scale = model.model.language_model.norm.weight
    decay = 1 / torch.arange(1, len(scale) + 1, device=device)
    scale.copy_(decay / decay.square().mean().sqrt())
    return model.eval()


def files_of(sizes: Sizes, text: Text, processor: LlavaProcessor, name: str) -> ModelFiles:
    """What cachekd asks of a model's folder, without one."""
    files = ModelFiles(name)
    config = config_of(sizes, text)
    config.name_or_path = name
    vars(files).update(config=config, processor=processor, weights=f"random {name}")
    return files


def write_data(folder: Path, sizes: Sizes) -> Path:
    """LLaVA JSON: pictures as large as people have them, questions and answers of one length."""
    folder.mkdir()
    generator, pixels = random.Random(0), np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = Image.fromarray(pixels.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")

    def words(count: int) -> str:
        most = sizes.vocab - len(SPECIAL)
        return " ".join(f"w{generator.randrange(most)}" for _ in range(count))

    records = [
        {
            "id": f"s{number:05d}",
            "image": f"{number % PICTURES}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{words(sizes.question)}"},
                {"from": "gpt", "value": words(sizes.answer)},
            ],
        }
        for number in range(sizes.samples)
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path
