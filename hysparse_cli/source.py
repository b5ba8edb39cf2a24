"""Where a model comes from: a folder, or a repository of the Hugging Face hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hysparse_cli.checkpoint import CODE_FILES, SIDE_FILES
from hysparse_cli.errors import OutOfResources, UnreadableInput

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A model's folder; ``revision`` is the commit where it came from the hub."""

    name: str
    folder: Path
    revision: str | None = None


def locate(
    model: str, *, revision: str | None = None, with_code: bool = False, weights: bool = True
) -> Source:
    """The folder ``model``, or what the hub holds under that id, downloaded into the hub's cache.

    Args:
        model: a folder or a hub id such as ``Qwen/Qwen3-0.6B``.
        revision: the branch, tag or commit of a hub id.
        with_code: download Python files too.
        weights: download weights and tokenizer; without, config.json alone.
    Raises: UnreadableInput where there is neither, or the hub can't be reached.
    """
    folder = Path(os.path.expanduser(model))
    if folder.exists():
        return Source(model, folder)
    if not _HUB_ID.fullmatch(model) or model.endswith((".git", ".safetensors")):
        raise UnreadableInput(f"{model}: no such folder, and not the form of a hub id (owner/name)")
    patterns = [*SIDE_FILES, *(CODE_FILES if with_code else ()), "*.safetensors"]
    return _download(model, revision, patterns if weights else ["config.json"])


def _download(model: str, revision: str | None, patterns: list[str]) -> Source:
    from huggingface_hub import errors, snapshot_download

    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=patterns)
    except errors.GatedRepoError:
        raise UnreadableInput(
            f"{model} is gated: ask for access on its page, then `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UnreadableInput(f"{model} has no revision {revision!r} on the hub") from None
    except errors.RepositoryNotFoundError:
        raise UnreadableInput(
            f"{model}: no such folder, and the hub has none such (private: `hf auth login`)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        raise UnreadableInput(
            f"{model}{at}: no such folder, and the hub can't be reached: check the path or the "
            "network"
        ) from None
    except errors.HfHubHTTPError as error:
        reason = " ".join(str(error).split())
        raise UnreadableInput(f"{model}{at}: the hub answered with an error: {reason}") from None
    except OSError as error:
        raise OutOfResources(f"can't download {model}{at}: {error.strerror or error}") from None
    path = Path(folder)
    return Source(model, path, path.name if path.parent.name == "snapshots" else None)
