"""Transcoders on the Hugging Face hub. Nothing else here talks to it about them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from clt.errors import UserError
from clt.files import steps

TRANSCODER = ("config.json", "model*.safetensors", "model*.safetensors.index.json")
"""Names of the files that `CrossLayerTranscoder.from_pretrained` reads. No others are fetched."""
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local_directory(name: str | Path, revision: str | None = None) -> Path:
    """The directory of a transcoder: `name` itself, or where the files of the hub's `user/name` are on this machine.

    Of a run it is the newest checkpoint. A directory of that name wins, and a Path is never a hub id. revision: a
    branch, tag or commit on the hub. Raises UserError as `fetch`, and for the revision of a directory.
    """
    if isinstance(name, str) and _ID.fullmatch(name) and not Path(name).exists():
        directory = fetch(name, revision, TRANSCODER)
        if not (directory / "config.json").is_file():
            raise UserError(
                f"{name} on the hub has no config.json of a transcoder; wanted what `clt push` has written there"
            )
        return directory
    if revision is not None:
        raise UserError(f"revision={revision!r} is for the hub, but {name} is a name on this machine; leave out one")
    checkpoints = Path(name) / "checkpoints"
    return checkpoints / f"step_{found[-1]:08d}" if (found := steps(checkpoints)) else Path(name)


def fetch(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The local copy of those files of the hub's model `name`; the cache's, when the hub does not answer.

    Raises UserError when the hub lacks them or gives none to this login, and when it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with _asking(name, f"and this machine has no copy of {name}", revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def upload(name: str, files: Mapping[str, Path | bytes], message: str, *, private: bool) -> str:
    """Put the files, by their names there, into the hub's model `name` in one commit; makes it if need be.

    private: of a new one. Returns its address. Raises UserError without a login, and when the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not _ID.fullmatch(name):
        raise UserError(f"{name!r} is no name on the hub; wanted user/name")
    if get_token() is None:
        raise UserError(
            f"nobody is logged in to the hub, so nothing was pushed to {name}: `hf auth login`, or HF_TOKEN"
        )
    operations = [
        CommitOperationAdd(place, content if isinstance(content, bytes) else str(content))
        for place, content in files.items()
    ]
    with _asking(name, f"so nothing was pushed to {name}"):
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, operations, commit_message=message)
    return str(address)


@contextmanager
def _asking(name: str, unreached: str, revision: str | None = None) -> Iterator[None]:
    """Raise UserError for whatever the hub's client raises: its own errors, and those of its HTTP library.

    unreached: what it means that the hub cannot be reached.
    """
    from huggingface_hub import constants, errors

    hub = f"the hub ({constants.ENDPOINT})"
    try:
        yield
    except errors.GatedRepoError as error:
        message = f"{name} on {hub} is gated: ask for access on its page, and log in with `hf auth login`"
        raise UserError(message) from error
    except errors.RevisionNotFoundError as error:
        message = f"{name} on {hub} has no revision {revision!r}; wanted a branch, tag or commit of it"
        raise UserError(message) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no directory {name}, nor such a model on {hub} that this login may see: check the spelling; a "
            "private one needs `hf auth login`"
        ) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of the upload of one file
            error = error.__cause__
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if status in (401, 403):
            raise UserError(
                f"{hub} refused {name} to this login (status {status}): use a token that may write there, by `hf auth "
                "login` or HF_TOKEN"
            ) from error
        if isinstance(error, OSError) and error.errno is not None:  # this machine's, such as a full disk
            raise
        if isinstance(error, errors.HfHubHTTPError | ValueError):
            raise UserError(f"{hub} refused {name} ({_text(error)})") from error
        raise UserError(
            f"{hub} cannot be reached, {unreached} ({_text(error)}): check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error


def _text(error: BaseException) -> str:
    """What the client says, in one line; of its long text about a missing copy, the cause alone."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _text(error.__cause__)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
