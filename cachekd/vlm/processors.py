"""Processors without their video part, which needs torchvision and which no image needs."""

from __future__ import annotations

from typing import Any


def without_video(processor_class: Any) -> Any:
    """A processor's class that neither takes, loads nor saves a video processor; its name stays.

    Images and text are processed by the class's own code.
    """

    class ImagesOnly(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

    ImagesOnly.__name__, ImagesOnly.__module__ = processor_class.__name__, processor_class.__module__
    return ImagesOnly
