"""Uploads a model directory to a repository of the Hugging Face hub. Missing requirements are reported first."""

from pathlib import Path
from typing import Any

from ..errors import UserError


def check_push(repository: str) -> None:
    """Check the requirements of an upload without creating anything: the name, the network, and a token with write
    access.

    Args:
        repository: ``OWNER/NAME``.

    Raises:
        UserError: a requirement is missing; the message states what to do.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {_line(error)}") from None
    if "/" not in repository:
        raise UserError(f"--push {repository}: use the form OWNER/NAME")
    if is_offline_mode():
        raise UserError(
            f"--push {repository}: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) disables the hub; unset it, or export "
            "without --push"
        )
    if get_token() is None:
        raise UserError(
            f"--push {repository}: no token for the hub; log in with `hf auth login`, or set HF_TOKEN to a token with "
            "write access"
        )
    try:
        me: dict[str, Any] = HfApi().whoami()
    except Exception as error:
        raise UserError(f"--push {repository}: {_why(error)}") from None
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push {repository}: the token of {me.get('name')} is read-only; use one with write access")


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a directory as one commit. Weight files in the repository that are not in the directory are deleted, so
    files of an earlier push do not mix with those of this one.

    Args:
        folder: a model directory.
        repository: ``OWNER/NAME``; created if it does not exist.
        private: if the repository is created, make it private.

    Returns:
        The URL of the repository.

    Raises:
        UserError: the repository cannot be written; the local directory is unchanged.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        place = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Upload {folder.name}",
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except Exception as error:
        raise UserError(
            f"--push {repository}: {_why(error)}. The export is complete in {folder}; after fixing the problem, upload "
            f"it with `hf upload {repository} {folder}`"
        ) from None
    return str(place)


def _why(error: Exception) -> str:
    """Return the cause of a failed request to the hub in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub rejects the token (401); log in again with `hf auth login`, or set HF_TOKEN"
    if status in (403, 404):
        return f"the token has no write access there ({status}); check the owner's name and the token's permissions"
    if status is not None:
        return f"the hub returned status {status} ({_line(error)})"
    return f"the hub cannot be reached ({type(error).__name__}: {_line(error)})"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")
