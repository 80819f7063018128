"""The example's models: small LLaVAs in Hugging Face format, and a tokenizer learned from the answers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
TEMPLATE = Path(__file__).parents[1] / "easy_vqa" / "chat_template.jinja"
SPREAD = 0.07  # of initial weights, some 1 / sqrt(width): with the usual 0.02 so narrow a model learns late
VOCAB_SIZE = 1024  # most names have several tokens
MARKS = ["<image>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_processor(texts: Iterable[str]) -> LlavaProcessor:
    """A LlavaProcessor whose byte-level BPE tokenizer is trained on `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<|end|>", *MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<|end|>", additional_special_tokens=MARKS
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
        chat_template=TEMPLATE.read_text(),
    )


def make_model(processor: LlavaProcessor, *, layers: int, text_width: int) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights: a CLIP tower of fixed width (the switch needs it) and a Llama."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=4 * VISION_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=VISION_WIDTH // 32,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=VISION_WIDTH,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=text_width,
            intermediate_size=8 * text_width // 3 // 64 * 64,
            num_hidden_layers=layers,
            num_attention_heads=text_width // 48,
            num_key_value_heads=text_width // 48,
            max_position_embeddings=512,
            initializer_range=SPREAD,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        ),
        initializer_range=SPREAD,
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
