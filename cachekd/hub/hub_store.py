"""A data set repository of the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from huggingface_hub import HfApi, RepoFile, get_session, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from cachekd.errors import CachekdError
from cachekd.hub.transfer import Listed, Moved, Progress, not_listed, reach, while_bytes_move

T = TypeVar("T")
_TOGETHER = 32  # files that are downloaded between two looks at what came
_PER_COMMIT = 128  # the hub limits commits per hour, and advises against thousands of files in one
_CHANGED = (409, 412)  # HTTP's: the branch is no longer at the commit that was named


class HubStore:
    """See `cachekd.hub.store.Store`. All reads are of one commit, whatever happens meanwhile; a
    commit is made on the one that was read, or not at all.

    Uploads go by LFS or xet, which know content by its checksum: after an interruption, what has been
    uploaded is not sent again, committed or not.

    Args:
        repo: `org/name`.
        revision: a branch, tag or commit; None: main.
    """

    def __init__(self, repo: str, revision: str | None, timeout: float) -> None:
        self.repo, self.revision, self._timeout = repo, revision, timeout
        self.url = f"hf://datasets/{repo}" + (f"@{revision}" if revision else "")
        self._api = HfApi(library_name="cachekd")
        self._digest = functools.cache(self._read_digest)
        get_session().timeout = timeout  # of requests that have no other: none at all is its default

    def create(self, *, private: bool) -> None:
        """Make the repository, and the branch, where they do not exist.

        Raises:
            CachekdError: it exists and is public, though it should be private.
        """

        def call() -> bool:
            self._api.create_repo(self.repo, repo_type="dataset", private=private or None, exist_ok=True)
            public = private and not self._api.dataset_info(self.repo).private
            if self.revision is not None and not public:
                self._api.create_branch(self.repo, repo_type="dataset", branch=self.revision, exist_ok=True)
            return public

        if self._reach(call, "the repository cannot be made"):
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
        if file.lfs is not None:
            return file.lfs.sha256
        return self._digest(name, file.blob_id)

    def _read_digest(self, name: str, _blob: str) -> str:
        # The hub keeps small text files in git, under git's own checksum.
        return hashlib.sha256(self.read(name, self._files[name].size) or b"").hexdigest()

    def read(self, name: str, most: int) -> bytes | None:
        file = self._files.get(name)
        if file is None:
            return None
        if file.size > most:
            raise not_listed(f"{self.url}/{name}", f"{most:,} bytes at most", f"{file.size:,} bytes")

        def call() -> bytes:
            with TemporaryDirectory() as folder:  # the client's own cache would keep it
                path = self._api.hf_hub_download(
                    self.repo, name, repo_type="dataset", revision=self._commit, local_dir=folder
                )
                return Path(path).read_bytes()

        return self._reach(call, "the file cannot be read")

    def fetch(self, files: Sequence[Listed], folder: Path, progress: Progress) -> Iterator[Listed]:
        for file in files:
            size = self._files[file.name].size if file.name in self._files else None
            if size != file.bytes:
                found = "no file" if size is None else f"{size:,} bytes"
                raise not_listed(f"{self.url}/{file.name}", f"{file.bytes:,} bytes", found)
        for first in range(0, len(files), _TOGETHER):
            some = files[first : first + _TOGETHER]
            self._reach(lambda: self._download(some, folder, progress), "the files cannot be downloaded")  # noqa: B023
            yield from some

    def _download(self, files: Sequence[Listed], folder: Path, progress: Progress) -> None:
        moved = Moved(self.url, sum(file.bytes for file in files), progress)
        download = functools.partial(
            snapshot_download,
            self.repo,
            repo_type="dataset",
            revision=self._commit,
            local_dir=folder,
            allow_patterns=[file.name for file in files],
            tqdm_class=_bar(moved),
        )
        try:
            # Watched, because the client tries a stall five times more, and xet has limits of its own.
            while_bytes_move(download, moved, self._timeout)
            moved.finish()  # with what an earlier pull had fetched
        except BaseException:
            moved.undo()
            raise

    def put(self, files: Sequence[Listed], folder: Path, progress: Progress) -> None:
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
            try:
                self._commit = upload(
                    repo_id=self.repo,
                    repo_type="dataset",
                    revision=self.revision,
                    parent_commit=self._commit,
                    **what,
                ).oid
            except HfHubHTTPError as error:
                if error.response.status_code in _CHANGED:
                    return False
                raise
            return True

        return self._reach(call, "the files cannot be uploaded")

    def _reach(self, call: Callable[[], T], problem: str) -> T:
        return reach(call, self.url, problem, timeout=self._timeout)

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

        return self._reach(call, "the hub cannot be asked for the repository")

    @cached_property
    def _files(self) -> dict[str, RepoFile]:
        def call() -> dict[str, RepoFile]:
            try:
                tree = self._api.list_repo_tree(
                    self.repo, recursive=True, repo_type="dataset", revision=self._commit
                )
                return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            except EntryNotFoundError:  # a repository without any file
                return {}

        return self._reach(call, "the hub cannot be asked for its files")


def _bar(moved: Moved) -> type[tqdm]:
    """What the client tells of bytes."""

    class Bar(tqdm):
        def __init__(self, *args: Any, name: str = "", **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self._counts = kwargs.get("unit") == "B" and not name.endswith(".transfer")

        def update(self, n: float | None = 1) -> None:
            moved.relative_update(int(n or 0) if self._counts else 0)

    return Bar
