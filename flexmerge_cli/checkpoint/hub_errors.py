"""Turns errors of the Hub's client into ours, which say what is wrong and which command to run next. Mostly exit code
4."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flexmerge_cli.checkpoint.ranges import OF_THIS_MACHINE, http_error
from flexmerge_cli.errors import FlexmergeError, MachineError, SourceError, UsageError

if TYPE_CHECKING:
    from flexmerge_cli.checkpoint.place import HubPlace


@contextmanager
def hub_errors(place: "HubPlace") -> Iterator[None]:
    """Raise SourceError for any failure between this machine and the Hub, and UsageError for an invalid name."""
    from huggingface_hub import errors

    try:
        yield
    except FlexmergeError:
        raise
    except (http_error(), OSError, ValueError, LookupError, TypeError, errors.EntryNotFoundError) as error:
        # ValueError and the last three mean a response that is not the Hub's, such as the page of a proxy.
        raise hub_error(place, error) from None


def hub_error(place: "HubPlace", error: Exception) -> FlexmergeError:
    from huggingface_hub import constants, errors, get_token

    source, repository = place.source, place.repository
    status = getattr(getattr(error, "response", None), "status_code", None)
    match error:
        case errors.HFValidationError():
            return UsageError(f"`{source}` is not a valid repository name: {error}", hint="check the name")
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{repository}"
            if get_token() is None:
                return SourceError(f"{source} is gated", hint=f"ask for access at {page}, then run `hf auth login`")
            return SourceError(
                f"{source} is gated, and the token in use has no access to it",
                hint=f"ask for access at {page}; to use another token run `hf auth login`",
            )
        case errors.RevisionNotFoundError():
            return SourceError(
                f"{source}: no revision `{place.revision}`",
                hint=f"leave it out for the newest: flexmerge inspect {place.unpinned}",
            )
        case errors.RepositoryNotFoundError():
            return SourceError(
                f"{source}: no such repository", hint="check the name; for a private repository run `hf auth login`"
            )
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return offline(place, "is not in the Hub's cache")
        case errors.EntryNotFoundError():
            return SourceError(
                f"{source}: a file or folder is missing: {_line(error)}",
                hint=f"see {constants.ENDPOINT}/{repository}/tree/main",
            )
    if isinstance(error, OSError) and error.errno in OF_THIS_MACHINE:
        return MachineError(
            f"{error.filename or 'the cache'}: {error.strerror}",
            hint="make room, or set HF_HOME to another place",
        )
    if status == 401:
        return SourceError(f"{source}: the Hub does not accept the token", hint="run `hf auth login` for another one")
    return SourceError(
        f"{source} cannot be fetched: {_line(error)}",
        hint="run the command again: completed downloads are kept and not repeated",
    )


def offline(place: "HubPlace", what: str) -> SourceError:
    return SourceError(
        f"{place.source} {what}, and the Hub is not asked in offline mode",
        hint=f"run it once without --offline and HF_HUB_OFFLINE, or `hf download {place.repository}"
        + (f" --revision {place.revision}`" if place.revision else "`"),
    )


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
