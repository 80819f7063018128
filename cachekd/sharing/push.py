"""Publish a cache. The manifest goes last: until it is there, a half-uploaded folder is no cache."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cachekd.cache.manifest import MANIFEST_FILE, Manifest
from cachekd.cache.verify import verify_files
from cachekd.errors import CachekdError
from cachekd.sharing.card import dataset_card
from cachekd.sharing.claim import claimed
from cachekd.sharing.contents import CARD_FILE, Listed, listed_files
from cachekd.sharing.hub_store import HubStore
from cachekd.sharing.reach import TIMEOUT
from cachekd.sharing.store import OtherContent, Progress, Store, holds, open_store

_LOOKS = 5  # at what is there, until the manifest is among it


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: where the cache is now.
        uploaded, skipped: files that were sent, and that were there already.
        bytes: that were sent.
        kept_card: whether another README.md was there, and stays.
    """

    url: str
    uploaded: int
    skipped: int
    bytes: int
    kept_card: bool


def push_cache(
    path: str | Path,
    address: str,
    *,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    timeout: float = TIMEOUT,
    progress: Progress = lambda done: None,
) -> Pushed:
    """Upload a cache: shards, tail sketches, the list of what was left out, a card, then the manifest.

    The same call goes on after an interruption. What is there with the same content is not sent again.

    Args:
        path: the cache; it is verified first.
        address: `org/name` on the hub, or a URL for fsspec.
        license: of the card, as the hub names it; None: the card says that it is unknown.
        private, revision: for the hub.
        timeout: seconds without a byte after which the store is given up.
        progress: is told of bytes: verified, then uploaded or found there, then compared; each byte thrice.

    Raises:
        CachekdError: the cache is damaged, the store cannot be written or falls silent, or it holds another
            cache or another one is being pushed there.
    """
    manifest = Manifest.load(path)
    if findings := verify_files(path, progress):
        raise CachekdError(
            "the cache is damaged, and was not published",
            where=str(findings[0].path),
            found=f"{findings[0].problem}; {len(findings)} finding(s) in all",
            fix="run `cachekd verify --repair`",
        )
    store = open_store(address, revision=revision, timeout=timeout)
    if isinstance(store, HubStore):
        store.create(private=private)
    elif private:
        raise CachekdError("--private is for the hub", where=address, fix="set the bucket's own permissions")
    content = (Path(path) / MANIFEST_FILE).read_bytes()
    last = _listed(MANIFEST_FILE, content)
    finished = holds(store, last)  # first: another cache's manifest is refused before anything is written
    with tempfile.TemporaryDirectory() as folder, claimed(store, last.sha256):
        card = dataset_card(manifest, store.url, license).encode()
        (Path(folder) / CARD_FILE).write_bytes(card)
        files = listed_files(manifest)
        missing = _missing(store, files, progress)
        store.put(missing, Path(path), progress)
        listed_card = _listed(CARD_FILE, card)
        there = store.sha256(CARD_FILE)
        if there is None:
            store.put([listed_card], Path(folder), lambda done: None)
        _publish(store, files, last, content, progress)
    sent = missing + [listed_card] * (there is None) + [last] * (not finished)
    size = sum(file.bytes for file in sent)
    kept = there not in (None, listed_card.sha256)
    return Pushed(store.url, len(sent), len(files) + 2 - len(sent), size, kept)


def _listed(name: str, content: bytes) -> Listed:
    return Listed(name, len(content), hashlib.sha256(content).hexdigest())


def _missing(store: Store, files: Sequence[Listed], progress: Progress) -> list[Listed]:
    missing = []
    for file in files:
        if holds(store, file):
            progress(file.bytes)
        else:
            missing.append(file)
    return missing


def _publish(store: Store, files: Sequence[Listed], last: Listed, content: bytes, progress: Progress) -> None:
    """Put the manifest; before and after, every file has to be as it lists it.

    Raises:
        OtherContent: one is not. Then this manifest is not there either.
    """
    made = False
    try:
        for _ in range(_LOOKS):
            store.look()
            if lacking := _missing(store, files, progress):
                raise OtherContent(
                    "a file that had been uploaded is no longer there, and the cache was not published",
                    where=f"{store.url}/{lacking[0].name}",
                    fix="find out who removes files there, then run the same command again",
                )
            progress = lambda done: None  # noqa: E731
            if holds(store, last):
                return
            made = store.put_first(MANIFEST_FILE, content) or made
        raise CachekdError(
            "others commit all the time, and the manifest is not put on top of what was not read",
            where=store.url,
            fix="run the same command again when they are done",
        )
    except OtherContent:
        if made and store.sha256(MANIFEST_FILE) == last.sha256:
            store.remove(MANIFEST_FILE)
        raise
