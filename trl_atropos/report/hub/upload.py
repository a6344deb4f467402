"""Uploads to the Hub that cannot end a run: in the background, from files that nothing can change, with errors that say what
to do."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from importlib import metadata
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    # Of the HTTP library that this version of the client uses.
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ...errors import HubUploadError
from ...progress import REMINDER_INTERVAL_S


logger = logging.getLogger(__name__)

STAGING_PREFIX = "_hub_upload_"
MAX_COPIED_BYTES = 2**20

HUB_ERRORS = (HTTPError, OSError, ValueError)
"""What the client of the Hub raises for HTTP and connections, for tokens and offline mode, and for names and answers.
"""


class HubClient:
    """What a run needs of the Hub.

    Uploads are staged in `run_dir`, the directory of the trainer, which messages name. Without a token, HF_TOKEN is
    used, or that of `hf auth login`. A failed upload is counted in `num_failed`, and logged if `logs_failures`;
    otherwise the caller looks at its future.
    """

    def __init__(self, run_dir: Path, token: str | None = None, logs_failures: bool = True):
        self.run_dir = run_dir
        self.logs_failures = logs_failures
        self.num_failed = 0
        self._api = HfApi(token=token, library_name="trl_atropos", library_version=metadata.version("trl-atropos"))

    def create_repo(self, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
        """Make a repository if there is none, and return its name as `namespace/name`.

        `repo_id` is `name`, or `namespace/name`. `private` says whether a new one is private; None leaves that to the
        Hub. `revision` is a branch that is made, too.

        Raises:
            [`HubUploadError`]: the repository cannot be made.
        """
        try:
            full_id = self._api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision:
                self._api.create_branch(full_id, branch=revision, exist_ok=True)
        except HUB_ERRORS as exc:
            raise self.explain(repo_id, exc) from exc
        return str(full_id)

    def upload(
        self,
        files: Mapping[str, Path],
        repo_id: str,
        commit_message: str,
        *,
        revision: str | None = None,
        path_in_repo: str | None = None,
    ) -> Future[CommitInfo]:
        """Begin an upload. One runs at a time, in the order of the calls.

        Large files are linked, so that a checkpoint that the trainer deletes meanwhile is still uploaded whole; they
        must not be written again before the upload has ended.

        `files` are given by their names in the repository `repo_id`, a `namespace/name`, and go into its directory
        `path_in_repo` or its root, on the branch `revision` or main. Returns the future of the commit. A failure is
        counted, and logged with the command that repeats the upload.
        """
        try:
            staged = self._stage(files)
        except OSError as exc:
            # A full disk, for example: told and counted like everything that goes wrong later.
            failed: Future[CommitInfo] = Future()
            failed.set_exception(exc)
            self._report(repo_id, failed)
            return failed

        def send() -> CommitInfo:
            try:
                return self._api.upload_folder(
                    repo_id=repo_id,
                    folder_path=staged,
                    path_in_repo=path_in_repo,
                    commit_message=commit_message,
                    revision=revision,
                )
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        future: Future[CommitInfo] = self._api.run_as_future(send)
        future.add_done_callback(lambda done: self._report(repo_id, done))
        return future

    def explain(self, repo_id: str, exc: BaseException) -> HubUploadError:
        """Make the error of an upload to a repository from what the client raised, with what mends it."""
        cause = exc.__cause__ if isinstance(exc, RuntimeError) and exc.__cause__ is not None else exc
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        why, mending = _reason(cause, status)
        detail = " ".join(str(getattr(cause, "server_message", None) or cause).split())[:300].rstrip(". ")
        name = f"HTTP {status}" if status else type(cause).__name__
        command = f"trl-atropos push {self.run_dir} --hub_model_id {repo_id}"
        is_lasting = status in (400, 401, 403, 404) or isinstance(
            cause, LocalTokenNotFoundError | OfflineModeIsEnabled | HFValidationError
        )
        return HubUploadError(
            f"The upload to the Hub repository {repo_id} failed: {name}: {detail}.",
            why,
            f"{mending} To upload later, without training again: `{command}`.",
            is_lasting=is_lasting,
        )

    def _stage(self, files: Mapping[str, Path]) -> Path:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=self.run_dir))
        for name, path in files.items():
            target = staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # Card, plot and configuration are small, and written again with every save.
            if path.stat().st_size <= MAX_COPIED_BYTES or not _link(path, target):
                shutil.copy2(path, target)
        return staged

    def _report(self, repo_id: str, done: Future[CommitInfo]) -> None:
        exc = done.exception()
        if exc is None:
            logger.info(f"Uploaded to {repo_id}: {done.result().commit_url}")
            return
        self.num_failed += 1
        if self.logs_failures:
            logger.warning(str(self.explain(repo_id, exc)))


def wait_for(future: Future[CommitInfo], what: str) -> None:
    """Wait for an upload, and say so every 10 seconds. `what` says in the message what is uploaded."""
    start = time.monotonic()
    while not wait([future], REMINDER_INTERVAL_S).done:
        logger.warning(f"Uploading {what} for {time.monotonic() - start:.0f} s.")


def remove_leftovers(run_dir: Path) -> None:
    """Remove the staged files of an upload that was killed."""
    for path in run_dir.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _link(path: Path, target: Path) -> bool:
    try:
        os.link(path, target)
    except OSError:
        # Another file system, or one without links.
        return False
    return True


def _reason(cause: BaseException, status: int | None) -> tuple[str, str]:
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is sent.", "Unset it, or train without --push_to_hub."
    if isinstance(cause, LocalTokenNotFoundError) or status == 401:
        return (
            "The Hub knows no user of this token, or there is none.",
            "Log in with `hf auth login`, set HF_TOKEN, or pass --hub_token.",
        )
    if status == 403:
        return (
            "The token may not write there, or the account's storage is full.",
            "Use a token with the role write, and a namespace of yours in --hub_model_id.",
        )
    if status == 404:
        return (
            "The repository or its revision does not exist, or the token may not see it.",
            "Check --hub_model_id and --hub_revision.",
        )
    if status == 429:
        return "The Hub limits how often an account may upload.", "Save less often, or use --hub_strategy end."
    if isinstance(cause, HFValidationError) or status == 400:
        return "The Hub does not take this name or content.", "Correct --hub_model_id, or what the message names."
    if isinstance(cause, OSError) and cause.filename is not None:
        return "The files are linked or copied beside the model first.", "Mend what the message names."
    if status is not None:
        return "The Hub had an error of its own.", "Look at https://status.huggingface.co."
    return "The Hub could not be reached, or broke the connection.", "Check the network, a proxy, and HF_ENDPOINT."
