"""A data set repository of the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, RepoFile
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from cachekd.errors import CachekdError
from cachekd.sharing.store import Progress, reaching

T = TypeVar("T")
_TOGETHER = 8  # files that are uploaded at a time, between two reports of progress
_PER_COMMIT = 128  # the hub limits commits per hour, and advises against thousands of files in one


class HubStore:
    """See `cachekd.sharing.store.Store`. All reads are of one commit, whatever happens on the hub meanwhile.

    Uploads go by LFS or xet, which know content by its checksum: after an interruption, what has been
    uploaded is not sent again, committed or not.

    Args:
        repo: `org/name`.
        revision: a branch, tag or commit; None: main.
    """

    def __init__(self, repo: str, revision: str | None = None) -> None:
        self.repo, self.revision = repo, revision
        self.url = f"hf://datasets/{repo}" + (f"@{revision}" if revision else "")
        self._api = HfApi(library_name="cachekd")

    def create(self, *, private: bool) -> None:
        """Make the repository, and the branch, where they do not exist.

        Raises:
            CachekdError: it exists and is public, though it should be private.
        """
        with reaching(self.url, "the repository cannot be made"):
            self._api.create_repo(self.repo, repo_type="dataset", private=private or None, exist_ok=True)
            public = private and not self._api.dataset_info(self.repo).private
            if self.revision is not None and not public:
                self._api.create_branch(self.repo, repo_type="dataset", branch=self.revision, exist_ok=True)
        if public:
            raise CachekdError(
                "the repository exists already, and is public",
                where=self.url,
                expected="a private one, or none",
                fix="make it private on the hub first, choose another name, or leave --private out",
            )

    def size(self, name: str) -> int | None:
        file = self._files.get(name)
        return None if file is None else file.size

    def sha256(self, name: str) -> str:
        file = self._files[name]
        if file.lfs is not None:
            return file.lfs.sha256
        with reaching(f"{self.url}/{name}", "the file cannot be read"):
            # The hub keeps small text files in git, under git's own checksum.
            path = self._api.hf_hub_download(self.repo, name, repo_type="dataset", revision=self._commit)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def fetch(self, name: str, to: Path, size: int) -> None:
        to.unlink(missing_ok=True)
        # A folder of its own: the client leaves notes beside what it downloads.
        folder = to.with_name(f"{to.name}.hub")
        try:
            with reaching(f"{self.url}/{name}", "the file cannot be downloaded"):
                path = self._api.hf_hub_download(
                    self.repo, name, repo_type="dataset", revision=self._commit, local_dir=folder
                )
            Path(path).replace(to)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, files: Mapping[str, Path], progress: Progress) -> None:
        additions = (
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()
        )
        for batch in _batched(additions, _PER_COMMIT):
            with reaching(self.url, "the files cannot be uploaded"):
                for few in _batched(batch, _TOGETHER):
                    self._api.preupload_lfs_files(
                        self.repo, few, repo_type="dataset", revision=self.revision, free_memory=False
                    )
                    progress(sum(addition.upload_info.size for addition in few))
                self._api.create_commit(
                    self.repo,
                    batch,
                    commit_message=_message(batch),
                    repo_type="dataset",
                    revision=self.revision,
                )
        for cached in ("_commit", "_files"):
            self.__dict__.pop(cached, None)

    @cached_property
    def _commit(self) -> str:
        with reaching(self.url, "the hub cannot be asked for the repository"):
            try:
                return str(self._api.dataset_info(self.repo, revision=self.revision).sha)
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                what = "revision" if isinstance(error, RevisionNotFoundError) else "repository"
                raise CachekdError(
                    f"there is no such {what} on the hub, or it may not be seen",
                    where=self.url,
                    fix="check the name; for a private one: hf auth login",
                ) from None

    @cached_property
    def _files(self) -> dict[str, RepoFile]:
        with reaching(self.url, "the hub cannot be asked for its files"):
            try:
                tree = self._api.list_repo_tree(
                    self.repo, recursive=True, repo_type="dataset", revision=self._commit
                )
                return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            except EntryNotFoundError:  # a repository without any file
                return {}


def _message(additions: list[CommitOperationAdd]) -> str:
    first = additions[0].path_in_repo
    return f"Add {first}" + (f" and {len(additions) - 1} more files" if len(additions) > 1 else "")


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
