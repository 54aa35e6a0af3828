"""Publishes a bundle in a repository of the Hub, in one commit of what changed; each content is sent once.

The folders of tasks are links here and copies there: files of the same sha256, which the Hub stores and receives once.
Contents are sent before the commit, which is the only thing that others see, so a push that breaks off publishes
nothing, and the next one sends what is missing. Files that an older bundle had there and this one has not are removed;
all others stay, and so does a card that somebody has changed.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmerge_cli.bundle.card import MAX_CARD_BYTES, is_own_card
from flexmerge_cli.bundle.export import export_task
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, read_manifest, sha256_of
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.verify import require_sound
from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.fetch import no_bars
from flexmerge_cli.checkpoint.hub import is_offline
from flexmerge_cli.checkpoint.hub_errors import hub_error
from flexmerge_cli.checkpoint.license import CARD_NAME
from flexmerge_cli.checkpoint.place import HubPlace
from flexmerge_cli.checkpoint.ranges import http_error
from flexmerge_cli.errors import FlexmergeError, SourceError, UsageError
from flexmerge_cli.formats.manifest import Manifest

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

MESSAGE = "flexmerge bundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A local file that a repository should have."""

    file: Path
    num_bytes: int
    sha256: str

    @staticmethod
    def of(file: Path) -> "Upload":
        return Upload(file=file, num_bytes=file.stat().st_size, sha256=sha256_of(file))


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """What a push sends to one repository, or has sent."""

    repository: str
    revision: str
    head: str | None
    """The commit that it was compared with; None if the repository, or the branch, is not there yet."""
    is_new: bool
    changed: Mapping[str, Upload]
    """By path in the repository."""
    removed: tuple[str, ...]
    num_bytes: int
    """Bytes that are sent, at most: contents that are not in the repository, each once."""
    notes: tuple[str, ...] = ()
    commit: str | None = None
    """The commit that was made, or was there already."""

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "revision": self.revision, "new": self.is_new, "changed": sorted(self.changed),
            "removed": list(self.removed), "bytes": self.num_bytes, "commit": self.commit,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _There:
    """The files that a repository has at the head of a branch."""

    is_new: bool
    head: str | None = None
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Path -> bytes, and the sha256 of an LFS file, else git's sha1."""


def push_bundle(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    per_task: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    on_compared: Callable[[str, Push], None] = lambda _source, _push: None,
) -> dict[str, Any]:
    """Publish a bundle, and return what was sent: the document of `flexmerge push --json`.

    repository: `hf://org/name`; with per_task, the name is continued by `-TASK`. on_compared: gets each repository and
    what is to be sent, before that. Raises IntegrityError for a damaged bundle, and as `compare` and `carry_out`.
    """
    target = HubPlace.of(repository)
    repositories(target, None)
    if is_offline(Access(offline=offline)):
        hint = "leave out --offline and HF_HUB_OFFLINE"
        raise SourceError(f"{target.source} cannot be written in offline mode", hint=hint)
    bundle, found = Bundle.open(folder), dict[str, Push]()
    if not dry_run:
        require_sound(bundle)
    for task, place in repositories(target, bundle.tasks if per_task else None).items():
        with tempfile.TemporaryDirectory() as scratch:
            uploads = bundle_uploads(bundle) if task is None else task_uploads(bundle, task, Path(scratch) / "out")
            one = compare(place, uploads, private=private, revision=revision)
            on_compared(place.source, one)
            if not dry_run:
                one = replace(one, commit=carry_out(one, place, private=private))
            found[place.source] = one
    return {"pushed": not dry_run, "repositories": {source: one.summary for source, one in found.items()}}


def bundle_uploads(bundle: Bundle) -> dict[str, Upload]:
    """Return all files of a bundle by their paths, links included."""
    files, path = bundle.manifest.files, bundle.path
    found = {name: Upload(file=path / name, num_bytes=e.bytes, sha256=e.sha256) for name, e in files.items()}
    found |= {link: found[name] for link, name in bundle.manifest.all_links.items()}
    beside = [name for name in (MANIFEST_NAME, CARD_NAME) if (path / name).is_file()]
    return found | {name: Upload.of(path / name) for name in beside}


def task_uploads(bundle: Bundle, task: str, scratch: Path) -> dict[str, Upload]:
    """Return the files of a task's ordinary folder. A task that must be decoded is exported to `scratch` first."""
    entry, inside = bundle.manifest.tasks[task], f"tasks/{task}/"
    if entry.stem is not None or entry.is_kept:
        own = {name: upload for name, upload in bundle_uploads(bundle).items() if name.startswith(inside)}
        return {name.removeprefix(inside): upload for name, upload in own.items()}
    export_task(bundle, task, scratch)
    return {path.relative_to(scratch).as_posix(): Upload.of(path) for path in scratch.rglob("*") if path.is_file()}


def compare(target: HubPlace, uploads: Mapping[str, Upload], *, private: bool, revision: str | None) -> Push:
    """Return what a push would do. Asks the Hub and changes nothing.

    Raises SourceError if the Hub does not answer, UsageError if `private` is asked for where a public repository is.
    """
    from huggingface_hub import HfApi

    with _push_errors(target):
        there = _there(HfApi(), target.repository, revision or "main", private=private)
        wanted, notes = dict(uploads), []
        if CARD_NAME in there.files and CARD_NAME in wanted and not _is_replaceable(target, there, wanted[CARD_NAME]):
            del wanted[CARD_NAME]
            notes.append(f"{target.source} has a {CARD_NAME} that flexmerge did not write: it stays")
        old = _old_files(target, there)
    changed = {name: up for name, up in wanted.items() if not _has(there.files.get(name), up)}
    known = {oid for _, oid in there.files.values()}
    new = {upload.sha256: upload.num_bytes for upload in changed.values() if upload.sha256 not in known}
    return Push(
        repository=target.repository,
        revision=revision or "main",
        head=there.head,
        is_new=there.is_new,
        changed=changed,
        removed=tuple(sorted((old & there.files.keys()) - uploads.keys())),
        num_bytes=sum(new.values()),
        notes=tuple(notes),
    )


def carry_out(push: Push, target: HubPlace, *, private: bool) -> str:
    """Send what changed, commit it, and return the commit that the branch then has.

    Raises SourceError if it may not be written, or has changed since `compare`; then nothing is published.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    if push.head is not None and not push.changed and not push.removed:
        return push.head
    api, name = HfApi(), push.repository
    with _push_errors(target), no_bars():
        if push.is_new:
            api.create_repo(name, private=private, exist_ok=True)
        if push.head is None and push.revision != "main":
            api.create_branch(name, branch=push.revision, exist_ok=True)
        additions = {path: _addition(path, upload) for path, upload in push.changed.items()}
        first = {upload.sha256: additions[path] for path, upload in sorted(push.changed.items(), reverse=True)}
        # The client sends what is twice in a commit twice: so each content goes ahead, once.
        api.preupload_lfs_files(name, list(first.values()), revision=push.revision, free_memory=False)
        done = api.create_commit(
            name,
            [*additions.values(), *(CommitOperationDelete(path_in_repo=path) for path in push.removed)],
            commit_message=MESSAGE,
            revision=push.revision,
            parent_commit=push.head,
        )
    return str(done.oid)


def _addition(path: str, upload: Upload) -> "CommitOperationAdd":
    from huggingface_hub import CommitOperationAdd

    found = CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(upload.file))
    found.upload_info.sha256 = bytes.fromhex(upload.sha256)  # known: the client need not read the file for it
    return found


def _there(api: "HfApi", repository: str, revision: str, *, private: bool) -> _There:
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return _There(is_new=True)
    if private and not info.private:
        raise UsageError(f"hf://{repository} is there and public", hint="leave out --private, or take another name")
    try:
        head = api.model_info(repository, revision=revision).sha
    except RevisionNotFoundError:
        return _There(is_new=False)
    tree = api.list_repo_tree(repository, recursive=True, revision=head)
    listed = [entry for entry in tree if isinstance(entry, RepoFile)]
    files = {entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id) for entry in listed}
    return _There(is_new=False, head=head, files=files)


def _has(listed: tuple[int, str] | None, upload: Upload) -> bool:
    """Return whether a file in a listing has the bytes of this one."""
    if listed is None or listed[0] != upload.num_bytes:
        return False
    return listed[1] == (upload.sha256 if len(listed[1]) == 64 else _git_sha1(upload.file, upload.num_bytes))


def _git_sha1(file: Path, num_bytes: int) -> str:
    digest = hashlib.sha1(f"blob {num_bytes}\0".encode())
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _is_replaceable(target: HubPlace, there: _There, upload: Upload) -> bool:
    """Return whether the card over there is this one, or one that flexmerge wrote and nobody has changed."""
    if _has(there.files[CARD_NAME], upload):
        return True
    size = there.files[CARD_NAME][0]
    return size <= MAX_CARD_BYTES and is_own_card(_fetched(target, there, CARD_NAME))


def _old_files(target: HubPlace, there: _There) -> set[str]:
    """Return the files of the bundle over there."""
    if MANIFEST_NAME not in there.files:
        return set()
    try:
        manifest: Manifest = read_manifest(_fetched(target, there, MANIFEST_NAME).parent)
    except FlexmergeError:
        return set()  # something else is called so, or it is of a newer version: nothing of it is removed
    return {*manifest.files, *manifest.all_links}


def _fetched(target: HubPlace, there: _There, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(target.repository, name, revision=there.head))


@contextmanager
def _push_errors(target: HubPlace) -> Iterator[None]:
    """Raise SourceError for whatever fails between us and the Hub, and say that nothing was published."""
    from huggingface_hub import errors

    try:
        yield
    except FlexmergeError:
        raise
    except (
        http_error(),
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        errors.EntryNotFoundError,
    ) as error:
        found = hub_error(target, error.__cause__ if isinstance(error.__cause__, Exception) else error)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise SourceError(
                f"{target.source} may not be written with the token in use; nothing was published",
                hint="run `hf auth login` with a token that may write there, or take another name",
            ) from None
        if status in (409, 412):
            raise SourceError(
                f"{target.source} has changed meanwhile; nothing was published", hint="run the command again"
            ) from None
        message = found.message.replace("cannot be fetched", "was not written")
        kept = "run the command again: what was sent is kept and not sent twice"
        hint = kept if message != found.message else found.hint
        raise type(found)(f"{message}; nothing was published", hint=hint) from None


def repositories(target: HubPlace, tasks: Sequence[str] | None) -> dict[str | None, HubPlace]:
    """Map each task to its repository; with tasks=None, map None to the one repository of the whole bundle."""
    if target.revision is not None or target.subfolder:
        raise UsageError(f"{target.source}: a bundle is a whole repository", hint="hf://org/name, and --revision NAME")
    if tasks is None:
        return {None: target}
    return {task: HubPlace.of(f"hf://{target.repository}-{task}") for task in tasks}
