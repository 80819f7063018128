"""What the examples share: small LLaVAs in Hugging Face format, and the loop that trains their parts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH_SIZE, VISION_WIDTH = 64, 16, 128
IGNORE = -100  # the label of a token that is not predicted


@dataclass(frozen=True)
class Markup:
    """How a chat is written, but for its texts.

    Attributes:
        template: the chat template's file.
        special_tokens: the first is the padding, the last ends an answer; "<image>" is among them.
        first: what stands before a conversation's first text.
        user: before a later text of the user.
        assistant: between a text of the user and an answer.
        blank: what an answer begins with.
    """

    template: Path
    special_tokens: tuple[str, ...]
    first: str
    user: str
    assistant: str
    blank: str

    @property
    def end(self) -> str:
        """What ends an answer."""
        return self.special_tokens[-1]


MARKUP = Markup(
    template=Path(__file__).parent / "easy_vqa" / "chat_template.jinja",
    special_tokens=("<pad>", "<image>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    first="<|user|>",
    user="<|user|>",
    assistant="<|end|><|assistant|>",
    blank="",
)


def make_processor(
    texts: Iterable[str], *, vocab_size: int, markup: Markup = MARKUP, longest: int | None = None
) -> LlavaProcessor:
    """A LlavaProcessor whose byte-level BPE tokenizer learns from `texts`.

    Args:
        vocab_size: of the tokenizer, at most.
        longest: bytes of a token, at most; None: any.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(markup.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=longest,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=markup.special_tokens[0],
        eos_token=markup.end,
        additional_special_tokens=list(markup.special_tokens[1:-1]),
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
        image_token="<image>",
        chat_template=markup.template.read_text(),
    )


def make_model(
    processor: LlavaProcessor,
    *,
    vocab_size: int,
    vision_layers: int,
    text_layers: int,
    text_width: int,
    spread: float | None = None,
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights: a CLIP tower of fixed width (the switch needs it) and a Llama.

    Args:
        vocab_size: rows of the embedding.
        spread: of the language model's and the projector's initial weights; None: transformers' own.
    """
    tokenizer = processor.tokenizer
    spreads = {} if spread is None else {"initializer_range": spread}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=4 * VISION_WIDTH,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=VISION_WIDTH,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=text_width,
            intermediate_size=8 * text_width // 3 // 64 * 64,
            num_hidden_layers=text_layers,
            num_attention_heads=text_width // 48,
            num_key_value_heads=text_width // 48,
            max_position_embeddings=512,
            **spreads,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        ),
        **spreads,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def optimise(
    modules: nn.Module,
    batches: Iterator[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    steps: int,
    lr: float,
    name: str,
    warmup: int = 100,
) -> None:
    """AdamW under a cosine, after `warmup` steps; prints the mean loss twenty times on the way."""
    weights = [p for p in modules.parameters() if p.ndim > 1]
    others = [p for p in modules.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    rate = lambda step: min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started, total, every = time.time(), 0.0, max(1, steps // 20)
    for step in range(1, steps + 1):
        loss = loss_of(next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % every == 0:
            print(
                f"{name} {step}/{steps}  loss {total / every:.4f}  {time.time() - started:.0f} s", flush=True
            )
            total = 0.0
