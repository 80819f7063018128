"""A tiny language model without images, and conversations for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from templates import shape_processor
from tiny import conversation


def save_lm(
    path: Path, *, seed: int, width: int = 32, rows: int = 360, sharp: float = 1.0, shape: str = "qwen3"
) -> Path:
    """A Llama with random weights and a tokenizer without a pad token."""
    tokenizer = shape_processor(shape).tokenizer
    tokenizer.pad_token = None
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_texts(path: Path, count: int) -> Path:
    records = []
    for index in range(count):
        turns = conversation(index, 1 + index % 3)
        messages = [
            {
                "role": "user" if turn["from"] == "human" else "assistant",
                "content": turn["value"].replace("<image>\n", ""),
            }
            for turn in turns
        ]
        records.append(json.dumps({"id": f"t{index:02d}", "messages": messages}))
    path.write_text("\n".join(records))
    return path
