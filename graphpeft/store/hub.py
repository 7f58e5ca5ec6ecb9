"""Adapters on the Hugging Face Hub, through huggingface_hub alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from graphpeft.errors import FileError

FILES = ["adapter*.json", "adapter*.safetensors"]
"""All that is fetched: neither pickles nor code."""


def local(folder: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or a snapshot of the Hub's repository if it is none and reads `owner/name`.

    Raises `FileError` if there is no such repository, or no way to it.
    """
    path = Path(folder)
    if path.exists() or not isinstance(folder, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", folder):
        return path
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(folder, revision=revision, allow_patterns=FILES))
    except (OSError, ValueError) as error:
        raise FileError(
            f"{folder} is no folder here, and the Hub gave no repository of that name: {error} Check the path, the name, and "
            f"the connection."
        ) from error


def upload(folder: Path, repo_id: str, **options: Any) -> str:
    """Make the repository if it is not there, and put the files of a folder into it; returns the commit's URL."""
    import huggingface_hub

    private = options.pop("private", None)
    token = options.get("token")
    huggingface_hub.create_repo(repo_id, private=private, exist_ok=True, token=token)
    return str(huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, **options))
