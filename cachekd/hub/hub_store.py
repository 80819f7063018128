"""A data set repository of the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoFile, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from cachekd.cache.manifest import ListedFile
from cachekd.errors import CachekdError
from cachekd.hub.reach import stalled
from cachekd.hub.store import Moved, Progress, Store

_PER_COMMIT = 128  # the hub limits commits per hour, and advises against thousands of files in one
_CHANGED = (409, 412)  # HTTP's: the branch is no longer at the commit that was named
_LOOK = 0.1  # seconds between looks at a download


class HubStore(Store):
    """All reads are of one commit, whatever happens meanwhile; a commit is made on the one that was read, or
    not at all.

    Uploads go by LFS or xet, which know content by its checksum: after an interruption, what has been
    uploaded is not sent again, committed or not.

    Args:
        repo: `org/name`.
        revision: a branch, tag or commit; None: main.
    """

    conditional = True
    at_a_time = 8  # as its client's own `snapshot_download`

    def __init__(self, repo: str, revision: str | None, timeout: float) -> None:
        super().__init__(f"hf://datasets/{repo}" + (f"@{revision}" if revision else ""), timeout)
        self.repo, self.revision = repo, revision
        self._api = HfApi(library_name="cachekd")
        self._of_data: dict[str, Any] = {"repo_id": repo, "repo_type": "dataset"}
        self._digest = functools.cache(self._read_digest)
        get_session().timeout = timeout  # of requests that have no other: none at all is its default

    def create(self, *, private: bool) -> None:
        """Make the repository, and the branch, where they do not exist."""

        def call() -> bool:
            self._api.create_repo(**self._of_data, private=private or None, exist_ok=True)
            public = private and not self._api.dataset_info(self.repo).private
            if self.revision is not None and not public:
                self._api.create_branch(**self._of_data, branch=self.revision, exist_ok=True)
            return public

        if self.reach(call, "the repository cannot be made"):
            raise CachekdError(
                "the repository exists already, and is public",
                where=self.url,
                expected="a private one, or none",
                fix="make it private on the hub first, choose another name, or leave --private out",
            )

    def look(self) -> None:
        for cached in ("_commit", "_files"):
            self.__dict__.pop(cached, None)

    def sha256(self, name: str) -> str | None:
        file = self._files.get(name)
        if file is None:
            return None
        return file.lfs.sha256 if file.lfs is not None else self._digest(name, file.blob_id)

    def _read_digest(self, name: str, _blob: str) -> str:
        # The hub keeps small text files in git, under git's own checksum.
        return hashlib.sha256(self.read(name, self._files[name].size) or b"").hexdigest()

    def get(self, name: str, folder: Path, moved: Moved) -> None:
        if name not in self._files:
            raise FileNotFoundError(name)
        moved.set_size(self._files[name].size)
        moved.relative_update(0)  # which compares it
        download = functools.partial(
            self._api.hf_hub_download,
            **self._of_data,
            filename=name,
            revision=self._commit,
            local_dir=folder,
            tqdm_class=_bar(moved),
        )
        # Watched, because the client tries a stall five times more, and xet has limits of its own.
        _while_bytes_move(download, moved, self.timeout)

    def put(self, files: Sequence[ListedFile], folder: Path, progress: Progress) -> None:
        for first in range(0, len(files), _PER_COMMIT):
            some = files[first : first + _PER_COMMIT]
            more = f" and {len(some) - 1} more files" if len(some) > 1 else ""
            if not self._on_top(
                self._api.upload_folder,
                folder_path=folder,
                allow_patterns=[file.name for file in some],
                commit_message=f"Add {some[0].name}{more}",
            ):
                return
            progress(sum(file.bytes for file in some))

    def put_first(self, name: str, content: bytes) -> bool:
        return self._on_top(
            self._api.upload_file, path_or_fileobj=content, path_in_repo=name, commit_message=f"Add {name}"
        )

    def remove(self, name: str) -> None:
        """Do nothing: the history keeps it, and what is there was compared in the commit before it."""

    def _on_top(self, upload: Callable[..., Any], **what: Any) -> bool:
        """Commit on what was read, or on our own last commit; False if that is no longer the newest one."""

        def call() -> bool:
            at = {"revision": self.revision, "parent_commit": self._commit}
            try:
                self._commit = upload(**self._of_data, **at, **what).oid
            except HfHubHTTPError as error:
                if error.response.status_code in _CHANGED:
                    return False
                raise
            return True

        return self.reach(call, "the files cannot be uploaded")

    @cached_property
    def _commit(self) -> str:
        def call() -> str:
            try:
                return str(self._api.dataset_info(self.repo, revision=self.revision).sha)
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                what = "revision" if isinstance(error, RevisionNotFoundError) else "repository"
                raise CachekdError(
                    f"there is no such {what} on the hub, or it may not be seen",
                    where=self.url,
                    fix="check the name; for a private one: hf auth login",
                ) from None

        return self.reach(call, "the hub cannot be asked for the repository")

    @cached_property
    def _files(self) -> dict[str, RepoFile]:
        def call() -> dict[str, RepoFile]:
            try:
                tree = self._api.list_repo_tree(**self._of_data, recursive=True, revision=self._commit)
                return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            except EntryNotFoundError:  # a repository without any file
                return {}

        return self.reach(call, "the hub cannot be asked for its files")


def _bar(moved: Moved) -> type[tqdm]:
    """What the client tells of bytes."""

    class Bar(tqdm):
        def __init__(self, *args: Any, name: str = "", **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self._counts = kwargs.get("unit") == "B" and not name.endswith(".transfer")

        def update(self, n: float | None = 1) -> None:
            moved.relative_update(int(n or 0) if self._counts else 0)

    return Bar


def _while_bytes_move(call: Callable[[], object], moved: Moved, timeout: float) -> None:
    """Run a client that cannot be told how long to wait for a byte.

    Raises:
        CachekdError: none came for `timeout` seconds.
        InterruptedError: the transfer was to stop.
    """
    future = Future[object]()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="store", daemon=True).start()  # nobody waits for a daemon's end
    try:
        while not wait([future], _LOOK).done:
            if moved.stop.is_set():
                raise InterruptedError
            if time.monotonic() - moved.last >= timeout:
                raise stalled(moved.where, timeout)
    except BaseException:
        moved.stop.set()
        raise
    future.result()
