"""Locates a model: a folder, or a repository of the Hugging Face hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hysparse_cli.errors import UnreadableInput, from_system, reads, system_error
from hysparse_cli.files.checkpoint import CODE_FILES, SIDE_FILES
from hysparse_cli.files.foreign import check_code
from hysparse_cli.printable import printable, single_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A model's folder; ``revision`` is the commit where it came from the hub."""

    name: str
    folder: Path
    revision: str | None = None


def locate(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Source:
    """The folder ``model``, or what the hub holds under that id, downloaded into the hub's cache.

    Args:
        model: a folder or a hub id such as ``Qwen/Qwen3-0.6B``.
        revision: the branch, tag or commit of a hub id.
        trust_remote_code: accept Python code that it brings, and download it too.
        weights: download weights and tokenizer; without, config.json alone.
    Raises: UnreadableInput where there is neither, the hub can't be reached, or it brings code that
        is not trusted.
    """
    folder = Path(os.path.expanduser(model))
    with reads(model):
        exists = folder.exists()
    if exists:
        check_code(folder, trust_remote_code=trust_remote_code)
        return Source(model, folder)
    if not _HUB_ID.fullmatch(model) or model.endswith((".git", ".safetensors")):
        raise _no_hub_id(model)
    patterns = [*SIDE_FILES, *(CODE_FILES if trust_remote_code else ()), "*.safetensors"]
    source = _download(model, revision, patterns if weights else ["config.json"])
    check_code(source.folder, trust_remote_code=trust_remote_code)
    return source


def _download(model: str, revision: str | None, patterns: list[str]) -> Source:
    from huggingface_hub import errors, snapshot_download

    at = f" at revision {printable(repr(revision))}" if revision else ""
    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=patterns)
    except errors.GatedRepoError:
        raise UnreadableInput(
            f"{model} is gated: ask for access on its page, then `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UnreadableInput(f"{model}{at}: the hub has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise UnreadableInput(
            f"{model}: no such folder, and the hub has none such (private: `hf auth login`)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        raise UnreadableInput(
            f"{model}{at}: no such folder, and the hub can't be reached: check the path or the "
            "network"
        ) from None
    except errors.HFValidationError:
        raise _no_hub_id(model) from None
    except Exception as error:  # the hub's answers, and whatever its client makes of them
        if (refusal := system_error(error)) and refusal.errno is not None:
            raise from_system(refusal, f"the hub's cache of {model}{at}", writing=True) from None
        reason = single_line(error)
        raise UnreadableInput(f"{model}{at}: the hub answered with an error: {reason}") from None
    path = Path(folder)
    return Source(model, path, path.name if path.parent.name == "snapshots" else None)


def _no_hub_id(model: str) -> UnreadableInput:
    return UnreadableInput(
        f"{printable(model)}: no such folder, and not the form of a hub id (owner/name)"
    )
