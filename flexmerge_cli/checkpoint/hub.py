"""`hf://org/name[@revision][:subfolder]`: the files of a Hub repository, in the normal Hub cache."""

import re
from pathlib import Path

from flexmerge_cli.errors import SourceError, UsageError

PATTERN = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?")


def is_hub(source: str) -> bool:
    """Whether the string has a scheme; without one it is a path, always."""
    return re.match(r"[a-z][a-z0-9+.-]*://", source) is not None


def resolve_hub(source: str) -> Path:
    """Download the checkpoint into the Hub cache and return its folder there."""
    match = PATTERN.fullmatch(source)
    if match is None or ".." in [*(match[2] or "").split("/"), *(match[3] or "").split("/")]:
        raise UsageError(
            f"`{source}` is no source that flexmerge knows", hint="write hf://org/name[@revision][:folder]"
        )
    repository, revision, subfolder = match.groups()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    wanted = [inside + pattern for pattern in ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.bin")]
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=wanted, ignore_patterns=None if inside else ["*/*"]
        )
    except HFValidationError as error:
        raise UsageError(f"`{source}` cannot be a repository: {error}", hint="check the name") from None
    except GatedRepoError:
        hint = f"ask for access at huggingface.co/{repository}, then `hf auth login`"
        raise SourceError(f"{source} is gated", hint=hint) from None
    except RevisionNotFoundError:
        raise SourceError(f"{source}: no revision `{revision}`", hint="check the revision") from None
    except RepositoryNotFoundError:
        hint = "check the name; for a private repository run `hf auth login`"
        raise SourceError(f"{source}: no such repository", hint=hint) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        hint = f"go online once and run `hf download {repository}`"
        raise SourceError(f"{source} cannot be fetched: {str(error)[:200]}", hint=hint) from None
    return Path(folder) / (subfolder or "")
