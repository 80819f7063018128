"""Publish a cache. The manifest goes last: until it is there, a half-uploaded folder is no cache."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cachekd.cache.manifest import MANIFEST_FILE, Manifest
from cachekd.cache.verify import verify_files
from cachekd.errors import CachekdError
from cachekd.sharing.card import dataset_card
from cachekd.sharing.contents import CARD_FILE, Listed, listed_files
from cachekd.sharing.hub_store import HubStore
from cachekd.sharing.store import Progress, Store, open_store


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
    progress: Progress = lambda done: None,
) -> Pushed:
    """Upload a cache: shards, tail sketches, the list of what was left out, a card, then the manifest.

    The same call goes on after an interruption. What is there with the same content is not sent again.

    Args:
        path: the cache; it is verified first.
        address: `org/name` on the hub, or a URL for fsspec.
        license: of the card, as the hub names it; None: the card says that it is unknown.
        private, revision: for the hub.
        progress: is told of bytes: verified, and then compared or uploaded; each byte twice.

    Raises:
        CachekdError: the cache is damaged, the store cannot be written, or holds another cache.
    """
    manifest = Manifest.load(path)
    if findings := verify_files(path, progress):
        raise CachekdError(
            "the cache is damaged, and was not published",
            where=str(findings[0].path),
            found=f"{findings[0].problem}; {len(findings)} finding(s) in all",
            fix="run `cachekd verify --repair`",
        )
    store = open_store(address, revision=revision)
    if isinstance(store, HubStore):
        store.create(private=private)
    elif private:
        raise CachekdError("--private is for the hub", where=address, fix="set the bucket's own permissions")
    with tempfile.TemporaryDirectory() as folder:
        card = Path(folder) / CARD_FILE
        card.write_text(dataset_card(manifest, store.url, license), encoding="utf-8")
        return _upload(Path(path), manifest, store, card, progress)


def _upload(path: Path, manifest: Manifest, store: Store, card: Path, progress: Progress) -> Pushed:
    content = (path / MANIFEST_FILE).read_bytes()
    last = Listed(MANIFEST_FILE, len(content), hashlib.sha256(content).hexdigest())
    finished = _is_there(store, last)  # first: another cache's manifest is refused before anything is sent
    missing: dict[str, Path] = {}
    files = listed_files(manifest)
    for file in files:
        if _is_there(store, file):
            progress(file.bytes)
        else:
            missing[file.name] = path / file.name
    has_card = store.size(CARD_FILE) is not None
    kept = has_card and store.sha256(CARD_FILE) != hashlib.sha256(card.read_bytes()).hexdigest()
    sent = sum((path / name).stat().st_size for name in missing)
    store.put(missing, progress)
    late = ({} if has_card else {CARD_FILE: card}, {} if finished else {MANIFEST_FILE: path / MANIFEST_FILE})
    for some in late:
        if some:
            store.put(some, lambda done: None)
            sent += sum(file.stat().st_size for file in some.values())
    uploaded = len(missing) + sum(map(len, late))
    return Pushed(store.url, uploaded, len(files) + 2 - uploaded, sent, kept)


def _is_there(store: Store, file: Listed) -> bool:
    """Whether the store has this file.

    Raises:
        CachekdError: it has another one under its name.
    """
    size = store.size(file.name)
    if size is None:
        return False
    found = store.sha256(file.name) if size == file.bytes else None
    if found == file.sha256:
        return True
    raise CachekdError(
        "the store holds another file under this name, and nothing is ever overwritten",
        where=f"{store.url}/{file.name}",
        expected=f"no file, or {file.bytes:,} bytes with sha256 {file.sha256}",
        found=f"{size:,} bytes" + (f" with sha256 {found}" if found else ""),
        fix="publish under another name (or --revision), or remove what is there",
    )
