"""A data set repository of the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

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
from cachekd.sharing.contents import Listed, not_listed
from cachekd.sharing.reach import Line, Watch
from cachekd.sharing.store import Progress, holds

T = TypeVar("T")
_TOGETHER = 32  # files that are downloaded between two looks at what came
_PER_COMMIT = 128  # the hub limits commits per hour, and advises against thousands of files in one
_CHANGED = (409, 412)  # HTTP's: the branch is no longer at the commit that was named
_TIMES = 5  # that a commit is tried on top of what others committed meanwhile
_DOWN = "the files cannot be downloaded"


class HubStore:
    """See `cachekd.sharing.store.Store`. All reads are of one commit, whatever happens meanwhile; a
    commit is made on the one that was read, or not at all.

    Uploads go by LFS or xet, which know content by its checksum: after an interruption, what has been
    uploaded is not sent again, committed or not.

    Args:
        repo: `org/name`.
        revision: a branch, tag or commit; None: main.
    """

    def __init__(self, repo: str, revision: str | None, line: Line) -> None:
        self.repo, self.revision, self._line = repo, revision, line
        self.url = f"hf://datasets/{repo}" + (f"@{revision}" if revision else "")
        self._api = HfApi(library_name="cachekd")
        get_session().timeout = line.timeout  # of requests that have no other: none at all is its default

    def create(self, *, private: bool) -> None:
        """Make the repository, and the branch, where they do not exist.

        Raises:
            CachekdError: it exists and is public, though it should be private.
        """

        def call(_watch: Watch) -> bool:
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
        # The hub keeps small text files in git, under git's own checksum.
        content = self.read(name, file.size)
        return None if content is None else hashlib.sha256(content).hexdigest()

    def read(self, name: str, most: int) -> bytes | None:
        file = self._files.get(name)
        if file is None:
            return None
        if file.size > most:
            raise not_listed(f"{self.url}/{name}", f"{most:,} bytes at most", f"{file.size:,} bytes")

        def call(_watch: Watch) -> bytes:
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
            bytes_of = _Bytes(sum(file.bytes for file in some), progress, self.url)
            self._reach(lambda watch: self._download(some, folder, bytes_of.bar(watch)), _DOWN, silent=False)  # noqa: B023
            bytes_of.finish()  # with what an earlier pull had fetched
            yield from some

    def _download(self, files: Sequence[Listed], folder: Path, bar: type[tqdm]) -> None:
        snapshot_download(
            self.repo,
            repo_type="dataset",
            revision=self._commit,
            local_dir=folder,
            allow_patterns=[file.name for file in files],
            tqdm_class=bar,
        )

    def put(self, files: Sequence[Listed], folder: Path, progress: Progress) -> None:
        for first in range(0, len(files), _PER_COMMIT):
            some = files[first : first + _PER_COMMIT]
            lacking = list(some)
            for _ in range(_TIMES):
                if lacking:
                    self._upload([file.name for file in lacking], folder)
                    self.look()
                    lacking = [file for file in some if not holds(self, file)]
            if lacking:
                raise CachekdError(
                    "others commit all the time, and nothing is put on top of what was not read",
                    where=self.url,
                    fix="run the same command again when they are done",
                )
            progress(sum(file.bytes for file in some))

    def _upload(self, names: list[str], folder: Path) -> bool:
        return self._on_top(
            self._api.upload_folder,
            folder_path=folder,
            allow_patterns=names,
            commit_message=f"Add {names[0]}" + (f" and {len(names) - 1} more files" if names[1:] else ""),
        )

    def put_first(self, name: str, content: bytes) -> bool:
        return self._on_top(
            self._api.upload_file, path_or_fileobj=content, path_in_repo=name, commit_message=f"Add {name}"
        )

    def remove(self, name: str) -> None:
        """Nothing: the history keeps it, and what is there was compared in the commit that it was put on."""

    def _on_top(self, upload: Callable[..., Any], **what: Any) -> bool:
        """Commit on what was read; False if that is no longer the branch's newest commit."""

        def call(_watch: Watch) -> bool:
            try:
                upload(
                    repo_id=self.repo,
                    repo_type="dataset",
                    revision=self.revision,
                    parent_commit=self._commit,
                    **what,
                )
            except HfHubHTTPError as error:
                if error.response.status_code in _CHANGED:
                    return False
                raise
            return True

        # Without a limit of ours: the client does not tell of bytes that it sends.
        return self._reach(call, "the files cannot be uploaded")

    def _reach(self, call: Callable[[Watch], T], problem: str, *, silent: bool = True) -> T:
        return self._line.reach(call, self.url, problem, silent=silent)

    @cached_property
    def _commit(self) -> str:
        def call(_watch: Watch) -> str:
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
        def call(_watch: Watch) -> dict[str, RepoFile]:
            try:
                tree = self._api.list_repo_tree(
                    self.repo, recursive=True, repo_type="dataset", revision=self._commit
                )
                return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            except EntryNotFoundError:  # a repository without any file
                return {}

        return self._reach(call, "the hub cannot be asked for its files")


class _Bytes:
    """What came of a download: the client tells its bar, which stops it when it is too much."""

    def __init__(self, most: int, progress: Progress, where: str) -> None:
        self.most, self.progress, self.where, self.done = most, progress, where, 0

    def add(self, size: int) -> None:
        if self.done + size > self.most:
            raise not_listed(self.where, f"{self.most:,} bytes", "more")
        self.done += size
        self.progress(size)

    def finish(self) -> None:
        self.progress(self.most - self.done)

    def bar(self, watch: Watch) -> type[tqdm]:
        counted = self
        counted.progress(-counted.done)  # of a try before this one
        counted.done = 0

        class Bar(tqdm):
            def __init__(self, *args: Any, name: str = "", **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})
                self._counts = kwargs.get("unit") == "B" and not name.endswith(".transfer")

            def update(self, n: float | None = 1) -> None:
                watch.beat()
                if self._counts:
                    counted.add(int(n or 0))

        return Bar
