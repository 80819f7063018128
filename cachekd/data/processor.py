"""What is used of a processor."""

from __future__ import annotations

from typing import Any, Protocol


class Processor(Protocol):
    """transformers' own, or what stands in its place for a language model (`TextProcessor`).

    Attributes:
        tokenizer: transformers'; None of the classes has a type for it.
        image_processor: None: a language model's.
        image_token: the text that stands for an image; None: a language model's.
        chat_template: in Jinja, or several of them by name; None: the tokenizer may have one.
    """

    @property
    def tokenizer(self) -> Any: ...

    @property
    def image_processor(self) -> Any: ...

    @property
    def image_token(self) -> str | None: ...

    @property
    def chat_template(self) -> str | dict[str, str] | None: ...

    def __call__(self, *, text: list[str], images: Any = None, **options: Any) -> Any:
        """Model inputs by name, with an axis for the texts; `images` has a list for each text."""
        ...

    def save_pretrained(self, folder: Any) -> Any:
        """Write its files."""
        ...
