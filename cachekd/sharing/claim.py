"""Who pushes to an address: of two different caches, one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from cachekd.lock import said, this_process
from cachekd.sharing.hub_store import HubStore
from cachekd.sharing.store import OtherContent, Store

CLAIM_FILE = ".push.json"
_MOST = 10_000  # bytes


@contextmanager
def claimed(store: Store, manifest: str) -> Iterator[None]:
    """A file that names the manifest's checksum, made before the first upload and removed at the end. After
    an interruption it stays, and the same cache goes on under it. The hub has conditional commits instead.

    Where the store makes no file conditionally, two that begin in the same moment may both believe to be the
    first; then the comparison before and after the manifest refuses them.

    Args:
        manifest: sha256 of the manifest's file.

    Raises:
        OtherContent: another cache is being pushed there.
    """
    if isinstance(store, HubStore):
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
    content = store.read(CLAIM_FILE, _MOST)
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
