"""Publish a cache with its card."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jinja2
from huggingface_hub import DatasetCardData

from cachekd.cache.manifest import ListedFile, Manifest
from cachekd.cache.overview import contents, fidelity, fingerprints, origin
from cachekd.cache.verify import verify_files
from cachekd.config.fields import STORE_TIMEOUT
from cachekd.errors import CachekdError
from cachekd.hub.store import Progress, Store, open_store, untold
from cachekd.lock import said, this_process
from cachekd.paths import MANIFEST_FILE

_LOOKS = 8  # at what is there, until all of it is
CARD_FILE = "README.md"
CLAIM_FILE = ".push.json"
_MOST_CLAIM = 10_000  # bytes of it
UNKNOWN = "unknown"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


class OtherContent(CachekdError):
    """What is there is not what this push brings."""


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
    timeout: float = STORE_TIMEOUT,
    progress: Progress = untold,
) -> Pushed:
    """Upload a cache: shards, tail sketches, vocabulary, what was left out, a card, then the manifest.

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
    if address.startswith(("http://", "https://")):
        raise CachekdError(
            "a web server can only be read", where=address, fix="push to a folder, a bucket or the hub"
        )
    store = open_store(address, revision=revision, timeout=timeout)
    store.create(private=private)
    content = (Path(path) / MANIFEST_FILE).read_bytes()
    card = dataset_card(manifest, store.url, license).encode()
    last, files = _listed(MANIFEST_FILE, content), manifest.files
    _holds(store, last)  # first: another cache's manifest is refused before anything is written
    with _claimed(store, last.sha256):
        sent = _bring(store, files, Path(path), {CARD_FILE: card, MANIFEST_FILE: content}, progress)
        kept = store.sha256(CARD_FILE) != _listed(CARD_FILE, card).sha256
    return Pushed(store.url, len(sent), len(files) + 2 - len(sent), sum(sent.values()), kept)


def _listed(name: str, content: bytes) -> ListedFile:
    """List a file with this content as a manifest would."""
    return ListedFile(name, len(content), hashlib.sha256(content).hexdigest())


def _holds(store: Store, file: ListedFile) -> bool:
    """Whether the store has this file.

    Raises:
        OtherContent: it has another one under its name.
    """
    found = store.sha256(file.name)
    if found not in (None, file.sha256):
        raise OtherContent(
            "the store holds another file under this name, and nothing is ever overwritten",
            where=f"{store.url}/{file.name}",
            expected=f"no file, or one with sha256 {file.sha256}",
            found=f"one with sha256 {found}",
            fix="publish under another name (or --revision), or remove what is there",
        )
    return found is not None


def _bring(
    store: Store, files: list[ListedFile], folder: Path, small: dict[str, bytes], progress: Progress
) -> dict[str, int]:
    """Look at what is there and put what is missing, until nothing is: the manifest when all else was found
    to be as it lists it, and then everything is compared once more.

    Args:
        small: the card and the manifest.

    Returns:
        the bytes of each file that was sent.

    Raises:
        OtherContent: a file is not as listed. Then this manifest is not there either.
    """
    sent: dict[str, int] = {}
    last = _listed(MANIFEST_FILE, small[MANIFEST_FILE])

    def put_first(name: str) -> None:
        if store.put_first(name, small[name]):
            sent[name] = len(small[name])

    try:
        for turn in range(_LOOKS):
            store.look()
            tell = progress if turn < 2 else untold
            missing = []
            for file in files:
                if _holds(store, file):
                    tell(file.bytes)
                else:
                    missing.append(file)
            if missing:
                store.put(missing, folder, tell)
                sent |= {file.name: file.bytes for file in missing}
            if store.sha256(CARD_FILE) is None:
                put_first(CARD_FILE)
            if not missing and not _holds(store, last):
                put_first(MANIFEST_FILE)
            elif not missing and turn:
                return sent
        raise OtherContent(
            "others change what is there all the time, and nothing is put on top of what was not read",
            where=store.url,
            fix="run the same command again when they are done",
        )
    except OtherContent:
        if MANIFEST_FILE in sent and store.sha256(MANIFEST_FILE) == last.sha256:
            store.remove(MANIFEST_FILE)
        raise


@contextmanager
def _claimed(store: Store, manifest: str) -> Iterator[None]:
    """A file that names the manifest's checksum, made before the first upload and removed at the end. After
    an interruption it stays, and the same cache goes on under it. The hub has conditional commits instead.

    Where the store makes no file conditionally, two that begin in the same moment may both believe to be the
    first; then the comparison before and after the manifest refuses them.

    Args:
        manifest: sha256 of the manifest's file.

    Raises:
        OtherContent: another cache is being pushed there.
    """
    if store.conditional:
        yield
        return
    made = store.put_first(CLAIM_FILE, json.dumps({"manifest": manifest, **this_process()}).encode())
    try:
        _require_ours(store, manifest)
        yield
    except OtherContent:
        if made:
            store.remove(CLAIM_FILE)
        raise
    store.remove(CLAIM_FILE)


def _require_ours(store: Store, manifest: str) -> None:
    content = store.read(CLAIM_FILE, _MOST_CLAIM)
    if content is None:
        return  # its push has just ended: what is there now will be compared
    try:
        theirs = str(json.loads(content)["manifest"])
    except (ValueError, LookupError, TypeError):
        theirs = "a cache that it does not name"
    if theirs != manifest:
        raise OtherContent(
            "another cache is being pushed to this address",
            where=store.url,
            expected=f"a push of the manifest with sha256 {manifest}",
            found=f"one of {theirs}, by {said(content)}",
            fix="publish under another name, or wait for it; if that push has died, repeat its command, or "
            f"remove {store.url}/{CLAIM_FILE} and what it left there",
        )


def dataset_card(manifest: Manifest, address: str, license: str | None) -> str:
    """The card's Markdown with its YAML header.

    Args:
        address: where the cache will be, which the commands in the card name.
        license: as the hub names it (`apache-2.0`, `cc-by-4.0`, `other`); None: unknown.

    Raises:
        CachekdError: the licence is no such name.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise CachekdError(
            "this is no name of a licence",
            where="--license",
            expected="as the hub names them: apache-2.0, mit, cc-by-4.0, cc-by-nc-4.0, other, unknown, ...",
            found=license,
        )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cachekd.hub", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    name = address.rstrip("/").rpartition("/")[2].partition("@")[0]
    rows = origin(manifest) | contents(manifest) | fidelity(manifest) | fingerprints(manifest)
    return environment.get_template("dataset_card.md.jinja").render(
        header=_header(manifest, name, license or UNKNOWN),
        name=name,
        address=address if "://" in address else f"hf://datasets/{address}",
        unknown_license=(license or UNKNOWN) == UNKNOWN,
        license=license,
        rows=[(label, _cell(value)) for label, value in rows.items()],
        manifest=manifest,
    )


def _header(manifest: Manifest, name: str, license: str) -> str:
    size = next((tag for limit, tag in _SIZES if manifest.samples < limit), "n>1M")
    data = DatasetCardData(
        license=license,
        pretty_name=name,
        tags=["cachekd", "switch-kd", "knowledge-distillation", "logits", "vision-language-models"],
        task_categories=["image-text-to-text"],
        size_categories=[size],
        viewer=False,  # shards are no tables
    )
    return data.to_yaml()


def _cell(value: str) -> str:
    """Text in a Markdown table, whatever is in a path."""
    text = " ".join(value.split())
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)
