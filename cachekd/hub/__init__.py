"""Publish a cache, fetch it, or read it where it lies: the Hugging Face hub, or any URL that fsspec knows."""

from cachekd.hub.pull import Pulled, local_folder, pull_cache
from cachekd.hub.push import Pushed, push_cache

__all__ = ["Pulled", "Pushed", "local_folder", "pull_cache", "push_cache"]
