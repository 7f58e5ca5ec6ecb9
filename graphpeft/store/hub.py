"""Adapters on the Hugging Face Hub, through huggingface_hub. The Hub is contacted only on explicit request."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from graphpeft.errors import FileError

FILES = ["adapter*.json", "adapter*.safetensors"]
"""The only files that are downloaded: neither pickles nor code."""
PREFIX = "hub:"
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local(folder: str | Path, revision: str | None = None, hub: bool = False) -> Path:
    """The folder itself, or for `hub:owner/name` (with `hub`, `owner/name`) a downloaded snapshot of that repository.

    A mistyped path never contacts the Hub. Raises `FileError` if the folder or repository does not exist, or the Hub
    cannot be reached.
    """
    text = str(folder)
    if hub or text.startswith(PREFIX):
        return _snapshot(text.removeprefix(PREFIX), revision)
    if revision is not None:
        raise FileError(f"{folder} is a local folder and has no revision {revision!r}. Write {PREFIX}owner/name.")
    if not os.path.exists(folder):  # also False for text that cannot be a path
        meant = (
            f" For the repository of that name on the Hugging Face Hub, write {PREFIX}{text!s}."
            if _is_name(text)
            else ""
        )
        raise FileError(f"{folder}: there is no such folder. Check the path.{meant}")
    return Path(folder)


def _is_name(text: str) -> bool:
    return REPOSITORY.fullmatch(text) is not None and len(text) <= 200


def _snapshot(name: str, revision: str | None) -> Path:
    if not _is_name(name):
        raise FileError(f"{name[:80]!r} is not the name of a Hugging Face Hub repository. Write {PREFIX}owner/name.")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=FILES))
    except (OSError, ValueError) as error:
        raise FileError(
            f"Cannot download repository {name} from the Hub: {error} Check the name, the revision, and the connection."
        ) from error


def upload(folder: Path, repo_id: str, **options: Any) -> str:
    """Upload a folder's files to a repository, which is created if it does not exist; returns the commit's URL."""
    import huggingface_hub

    private = options.pop("private", None)
    token = options.get("token")
    huggingface_hub.create_repo(repo_id, private=private, exist_ok=True, token=token)
    return str(huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, **options))
