"""A model directory to a repository of the Hugging Face hub: what is missing is told before anything is made."""

from pathlib import Path
from typing import Any

from ..errors import UserError


def check_push(repository: str) -> None:
    """Check what an upload needs, without making anything: the name, the network, and a token that may write.

    Args:
        repository: ``OWNER/NAME``.

    Raises:
        UserError: something is missing; says what to do.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {_line(error)}") from None
    if "/" not in repository:
        raise UserError(f"--push {repository}: give OWNER/NAME")
    if is_offline_mode():
        raise UserError(
            f"--push {repository}: the hub is switched off by HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE); unset it, or "
            "export without --push"
        )
    if get_token() is None:
        raise UserError(
            f"--push {repository}: there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        )
    try:
        me: dict[str, Any] = HfApi().whoami()
    except Exception as error:
        raise UserError(f"--push {repository}: {_why(error)}") from None
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push {repository}: the token of {me.get('name')} may only read; give one that may write")


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a directory as one commit. Weights that are in the repository and not in the directory are deleted, for
    files of an earlier push must not lie among those of this one.

    Args:
        folder: a model directory.
        repository: ``OWNER/NAME``; made where it does not exist.
        private: make it private, where it is made.

    Returns:
        The address of the repository.

    Raises:
        UserError: it cannot be written; the directory stays as it is.
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
            f"--push {repository}: {_why(error)}. The export is complete in {folder}; once this is mended, upload it "
            f"with `hf upload {repository} {folder}`"
        ) from None
    return str(place)


def _why(error: Exception) -> str:
    """What went wrong between here and the hub, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not know the token (401); log in again with `hf auth login`, or set HF_TOKEN"
    if status in (403, 404):
        return f"the token may not write there ({status}); check the owner's name and what the token may do"
    if status is not None:
        return f"the hub answered {status} ({_line(error)})"
    return f"the hub cannot be reached ({type(error).__name__}: {_line(error)})"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")
