# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Publish a staged folder to the Hub: one commit, verified afterwards, safe to repeat."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .repository import PUBLISHED, PublishError, StagedFile, describe_file, list_files


class DownloadError(RuntimeError):
    """Downloading stopped; the message has the reason and the fix. No damaged file stays in the cache."""


class Publisher:
    """Uploads one staged folder to one repository.

    The files arrive in a single commit on top of the head that was read first, so a reader sees either the old version
    or the new one, and a concurrent push is refused instead of overwritten. Running it again after an interruption
    sends only what is missing.

    Args:
        repo_id (`str`): `user/name`.
        token (`str`, *optional*): access token; defaults to `HF_TOKEN` or the one saved by `hf auth login`.
        retries (`int`, *optional*, defaults to 3): attempts after a server error or a dropped connection.
    """

    def __init__(self, repo_id: str, token: str | None = None, retries: int = 3):
        self.repo_id, self.retries = repo_id, retries
        self._token = token or get_token()
        self._api = HfApi(token=self._token, library_name="flashlite")

    def publish(
        self,
        folder: str | Path,
        *,
        message: str = "Publish checkpoint",
        private: bool | None = None,
        gated: str | None = None,
        branch: str | None = None,
        tag: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
    ):
        """Create the repository if needed, commit the folder, verify what arrived, tag it.

        Args:
            folder (`str` or `Path`): the staged folder, card included.
            message (`str`, *optional*): title of the commit.
            private (`bool`, *optional*): visibility of a repository that is created now.
            gated (`"auto"` or `"manual"`, *optional*): ask for access requests, set before the files arrive.
            branch (`str`, *optional*): branch to commit to, created from `main` if needed; defaults to `main`.
            tag (`str`, *optional*): tag for the commit.
            create_pr (`bool`, *optional*): open a pull request instead of committing to the branch.
            parent_commit (`str`, *optional*): refuse unless the branch still stands at this commit.

        Returns:
            `dict` with `commit` (sha), `url`, `tag`, `uploaded` and `deleted` (numbers of files).

        Raises:
            PublishError: with one sentence; nothing was changed unless the message says so.
        """
        files = list_files(folder)
        if not any(file.name == "README.md" for file in files):
            raise PublishError(f"{folder} has no README.md; render the model card first.")
        if not create_pr:
            self._try("create the repository", self._create, private, gated)
        elif gated or private is not None:
            raise PublishError("A pull request cannot change who sees the repository; drop --private and --gated.")
        if branch and branch != "main" and not create_pr:
            self._try(
                f"create the branch {branch}", self._api.create_branch, self.repo_id, branch=branch, exist_ok=True
            )
        commit = self._commit(Path(folder), files, message, branch, create_pr, parent_commit)
        if tag:
            self._try(f"set the tag {tag}", self._tag, tag, commit["commit"])
        return {**commit, "tag": tag}

    def _create(self, private: bool | None, gated: str | None) -> None:
        # an existing repository is not recreated: a token may have the right to push but not to create
        try:
            self._api.repo_info(self.repo_id)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            self._api.create_repo(self.repo_id, private=private, exist_ok=True)
        if gated:
            self._api.update_repo_settings(self.repo_id, gated=gated)

    def _tag(self, tag: str, commit: str) -> None:
        tags = {ref.name: ref.target_commit for ref in self._api.list_repo_refs(self.repo_id).tags}
        if tag in tags and tags[tag] != commit:
            raise PublishError(
                f"The files are published as {commit[:10]}, but the tag {tag} already names {tags[tag][:10]}; "
                "choose another tag."
            )
        if tag not in tags:
            self._api.create_tag(self.repo_id, tag=tag, revision=commit)

    def _commit(self, folder, files, message, branch, create_pr, parent_commit) -> dict:
        revision = branch or "main"
        head = self._try("read the repository", self._head, revision)
        if parent_commit and not head.startswith(parent_commit):
            raise PublishError(
                f"{revision} of {self.repo_id} stands at {head[:10]}, not at {parent_commit[:10]}: somebody else "
                "published; look at their commit, then run again."
            )
        for attempt in range(self.retries + 1):
            remote = self._try("list the files", self._remote_files, head)
            changed = [file for file in files if not _same(file, remote.get(file.name))]
            stale = [name for name in remote if PUBLISHED.fullmatch(name) and name not in {f.name for f in files}]
            report = {"uploaded": len(changed), "deleted": len(stale)}
            if not changed and not stale:
                return {"commit": head, "url": self._url(head), **report}
            additions = [
                CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str((folder / file.name).resolve()))
                for file in changed
            ]
            try:
                info = self._api.create_commit(
                    self.repo_id,
                    [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
                    commit_message=message,
                    revision=revision,
                    parent_commit=head,
                    create_pr=create_pr,
                )
            except Exception as error:
                # a pull request may exist although the response was lost; do not open a second one
                if create_pr or attempt == self.retries or not _is_transient(error):
                    raise self._explain("commit the files", error) from None
                time.sleep(min(2**attempt, 8) / 4)
                # the commit may exist although the response was lost: check before retrying
                now = self._try("read the repository", self._head, revision)
                remote = self._try("list the files", self._remote_files, now)
                if now != head and all(_same(file, remote.get(file.name)) for file in files):
                    return {"commit": now, "url": self._url(now), **report}
                continue
            self._verify(files, info.oid)
            return {"commit": info.oid, "url": info.pr_url or self._url(info.oid), **report}
        raise AssertionError("unreachable")

    def _head(self, revision: str) -> str:
        return self._api.repo_info(self.repo_id, revision=revision).sha

    def _remote_files(self, revision: str) -> dict:
        entries = self._api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}

    def _verify(self, files: list[StagedFile], commit: str) -> None:
        remote = self._try("read back the files", self._remote_files, commit)
        wrong = [file.name for file in files if not _same(file, remote.get(file.name))]
        if wrong:
            raise PublishError(
                f"{wrong[0]} arrived differently in {commit[:10]}; run again, and do not use that commit."
            )

    def _url(self, commit: str) -> str:
        return f"{self._api.endpoint}/{self.repo_id}/tree/{commit}"

    def _try(self, doing: str, function: Callable, *args, **kwargs):
        """Call the Hub; retry transient errors, explain all others in one sentence."""
        for attempt in range(self.retries + 1):
            try:
                return function(*args, **kwargs)
            except PublishError:
                raise
            except Exception as error:
                if attempt == self.retries or not _is_transient(error):
                    raise self._explain(doing, error) from None
                time.sleep(min(2**attempt, 8) / 4)

    def _explain(self, doing: str, error: Exception) -> Exception:
        return explain(doing, self.repo_id, error, self._token)


def download(repo_id: str, revision: str | None = None, token: str | None = None, cache_dir=None) -> Path:
    """Download a repository into the cache and compare each file with its checksum on the Hub.

    The client itself compares sizes only. A damaged file is removed from the cache, fetched once more, and refused
    if it is damaged again. A local folder, and the cache in offline mode, are returned as they are.

    Args:
        repo_id (`str`): `user/name`, or a folder.
        revision (`str`, *optional*): branch, tag or commit.
        token (`str`, *optional*): access token; defaults to `HF_TOKEN` or the saved one.
        cache_dir (`str` or `Path`, *optional*): defaults to the cache of huggingface_hub.

    Returns:
        `Path` of the snapshot.

    Raises:
        DownloadError: with one sentence.
    """
    if Path(repo_id).is_dir():
        return Path(repo_id)
    api = HfApi(token=token, library_name="flashlite")
    for _ in range(2):
        try:
            folder = Path(api.snapshot_download(repo_id, revision=revision, cache_dir=cache_dir))
            if is_offline_mode():
                return folder
            entries = api.list_repo_tree(repo_id, recursive=True, revision=folder.name)
            remote = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}
        except Exception as error:
            raise explain("download", repo_id, error, token or get_token(), DownloadError) from None
        damaged = [name for name in remote if not _same(describe_file(folder / name, name), remote[name])]
        if not damaged:
            return folder
        for name in damaged:
            (folder / name).resolve().unlink()
            (folder / name).unlink(missing_ok=True)
    raise DownloadError(f"{damaged[0]} of {repo_id} arrived damaged twice and was removed; try again later.")


def explain(doing: str, repo: str, error: Exception, token: str | None, kind: type = PublishError) -> Exception:
    """Turn an error of the client into one sentence without access tokens; unknown errors are returned unchanged."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if isinstance(error, GatedRepoError):
        text = f"{repo} is gated and this account has no access; ask for it on the repository's page."
    elif isinstance(error, RevisionNotFoundError):
        text = f"{repo} has no such branch, tag or commit; check the revision."
    elif isinstance(error, LocalEntryNotFoundError):
        text = f"{repo} is not in the cache and the Hub cannot be reached; connect once to download it."
    elif isinstance(error, HFValidationError):
        text = f"'{repo}' is not a repository name; use user/name."
    elif status == 401 and not token:
        text = f"Not logged in, or {repo} does not exist (401); set HF_TOKEN or run `hf auth login`."
    elif status == 401:
        text = f"The token was refused for {repo}, or it does not exist (401); check the name, or set a new HF_TOKEN."
    elif status == 403:
        text = f"This account may not {doing} in {repo} (403); use a token with that right, or your own name."
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        text = f"{repo} was not found, or this account may not see it (404); check the name and the token."
    elif status in (409, 412):
        text = f"{repo} changed while publishing ({status}); nothing was overwritten, run again."
    elif status == 413:
        text = f"The Hub refused a file of {repo} as too large (413); save with a smaller max_shard_size."
    elif status == 429:
        text = f"The Hub limits the rate of requests for {repo} (429); run again in a few minutes."
    elif _is_transient(error):
        cause = str(status) if status else type(error).__name__
        text = f"Could not {doing} in {repo} ({cause}); the connection or the Hub failed, run again to resume."
    elif isinstance(error, OSError) and error.strerror:
        text = f"Could not {doing} in {repo}: {error.strerror}."
    elif isinstance(error, RuntimeError) and (found := re.search(r"IO Error: ([^(]+)", str(error))):
        text = f"Could not {doing} in {repo}: {found[1].strip()}."
    elif status:
        said = " ".join(str(getattr(error, "server_message", None) or error).split())
        text = f"Could not {doing} in {repo}: the Hub answered {status} {said.replace(token or '***', '***')}"
    else:
        return error
    return kind(text)


def _same(file: StagedFile, entry) -> bool:
    """Whether a file of the repository has the content of the staged one."""
    if entry is None or entry.size != file.size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == file.sha256
    return entry.blob_id == file.blob_id


def _is_transient(error: Exception) -> bool:
    """Server errors and broken connections, the Xet client's included (it raises plain RuntimeError)."""
    if isinstance(error, EntryNotFoundError):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    # huggingface_hub has changed its HTTP library before; these class names are common to all
    names = {parent.__name__ for parent in type(error).__mro__}
    if names & {"TransportError", "ConnectionError", "TimeoutError"}:
        return True
    return type(error).__module__.startswith("hf_xet") or (
        isinstance(error, RuntimeError) and bool(re.search(r"request|network|server error|CAS|xet", str(error), re.I))
    )
