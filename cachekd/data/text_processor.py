"""A language model's tokenizer where a processor is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BatchEncoding


class TextProcessor:
    """Tokenises what a chat template wrote; there are no images.

    Args:
        tokenizer: transformers'.

    Attributes:
        image_token: None: no text stands for an image.
        image_processor: None.
    """

    image_token: str | None = None
    image_processor: Any = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> Any:
        """The tokenizer's."""
        return self.tokenizer.chat_template

    def __call__(
        self,
        *,
        text: list[str],
        images: Any = None,
        return_text_replacement_offsets: bool = False,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> BatchEncoding:
        """As the tokenizer's own `apply_chat_template(tokenize=True)`: special tokens are the template's."""
        return self.tokenizer(text, add_special_tokens=add_special_tokens, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)
