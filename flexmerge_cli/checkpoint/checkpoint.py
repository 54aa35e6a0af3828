"""Opens one model's files: turns a source string into its tensors (headers only), config and side files. Reads no
weights.

safetensors is preferred where a folder holds both formats. A model may have parts in subfolders, whose tensors have
names like `2_Dense/linear.weight`. Knows nothing about other models, classes or blocks.
"""

import os
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from flexmerge_cli.checkpoint import foreign
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.choose import ADAPTER_FILES, WEIGHT_FILES, WEIGHT_SUFFIXES, variants
from flexmerge_cli.checkpoint.contents import COMPOSITES, Contents, contents_of, is_left
from flexmerge_cli.checkpoint.folder import Folder, LocalFolder, bundle_of, inside
from flexmerge_cli.checkpoint.license import CARD_NAME, read_license
from flexmerge_cli.checkpoint.parts import part_of, stem_of
from flexmerge_cli.checkpoint.quantised import HINT, by_config
from flexmerge_cli.checkpoint.remote import RemoteFile
from flexmerge_cli.checkpoint.stream import StreamedFile, StreamPool
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.checkpoint.unclear import no_weights
from flexmerge_cli.checkpoint.weights import each, read_config, read_weight_file, read_weights
from flexmerge_cli.errors import DataError, SourceError, UsageError
from flexmerge_cli.regular_file import check_kind, read_file
from flexmerge_cli.text import expanded, is_text

MAX_SIDE_BYTES = 256 << 20
MAX_POINTER_BYTES = 1024  # a pointer of Git LFS has about 130

Source = TypeVar("Source")
Opened = TypeVar("Opened")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One model's files, on this disk or still to be downloaded from the Hub."""

    source: str
    """The source as the user wrote it; a Hub source is pinned to a commit."""
    path: Path
    """The absolute path of the folder or file."""
    tensors: dict[str, StoredTensor]
    """The tensors by own name, in the order of the files and of the bytes in them."""
    weight_bytes: dict[Path, int]
    """The size of each weight file."""
    config: dict[str, Any] = field(default_factory=dict)
    """The contents of config.json, or empty."""
    side_files: dict[str, Path] = field(default_factory=dict)
    """The files beside the weights that belong to the model, by relative path, sorted."""
    parts: dict[str, str] = field(default_factory=dict)
    """For each subfolder with weights of its own, the stem of their file names; its tensors' names begin with its
    path."""
    left: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The files of the source that are not taken, by kind (see contents.py)."""
    remote: dict[Path, RemoteFile] = field(default_factory=dict)
    """Weight files that are not on this disk yet; `fetch` (fetch.py) downloads them to these paths."""
    private: frozenset[str] = frozenset()
    """Own names of tensors that stay private whatever other models hold: those that an adapter saves whole."""
    adapter: str | None = None
    """The kind of the adapter that makes this model from a base."""
    license: str | None = None
    """The licence that its card names, if any."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def ignored(self) -> tuple[str, ...]:
        """All files that are not taken, as readable text."""
        names = sorted(name for names in self.left.values() for name in names)
        return tuple(os.fsencode(name).decode(errors="replace") for name in names)

    def weight_paths(self) -> list[Path]:
        return list(dict.fromkeys(tensor.path for tensor in self.tensors.values()))


def open_checkpoint(
    source: str,
    *,
    relative_to: Path | None = None,
    access: Access = ONLINE,
    needs: Collection[str] | None = None,
    side_files: bool = True,
) -> Checkpoint:
    """Read the headers of the model at `source`: a folder, a weight file, `hf://org/name[@revision][:folder]`, or a
    URL.

    A path without a scheme never touches the network. From the Hub, only the config, the index and (with side_files)
    the other files of the model are downloaded, and the headers of the weights, by range. needs: names of side files
    that suffice. Raises SourceError if there is no checkpoint, and DataError if it is unsound.
    """
    from flexmerge_cli.checkpoint.hub import open_hub
    from flexmerge_cli.checkpoint.place import is_hub, is_remote

    if is_hub(source):
        place = open_hub(source, access, needs)
        return _open_folder(place.source, place.folder, place.file, access, side_files=side_files)
    if is_remote(source):
        from flexmerge_cli.checkpoint.urls import open_url

        address, file = open_url(source, access)
        return _open_folder(source, address, file, access, side_files=side_files)
    path = ((relative_to or Path()) / expanded(source)).absolute()
    if not is_text(str(path)):
        raise SourceError(f"{str(path)!r} is not Unicode text, which plans and bundles require", hint="rename it")
    if not _exists(path):
        looks_like_hub = source.count("/") == 1 and not source.startswith((".", "/", "~"))
        raise SourceError(
            f"no checkpoint at {path}: it does not exist",
            hint=f"for the Hub write hf://{source}" if looks_like_hub else "check the path",
        )
    check_kind(path)
    if path.is_file():
        return _open_folder(source, _FileFolder(path.parent), path.name, access)
    if (in_bundle := _task_of_bundle(path)) is not None:
        raise in_bundle
    return _open_folder(source, LocalFolder(path, follow_links=access.follow_links), None, access)


def _task_of_bundle(folder: Path) -> UsageError | None:
    """Return the error for a task's folder in a bundle, whose weights lie elsewhere: it says how to export the task.
    None for any other folder."""
    is_inner = folder.parent.parent.name == "coded" or (folder.parent.name, folder.name) == ("base", "files")
    folder = folder.parent if is_inner else folder
    bundle = bundle_of(folder)
    if bundle is None:
        return None
    if any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir()):  # a kept adapter is whole
        return None
    if folder.parent == bundle:
        return UsageError(
            f"{folder} is the base of a bundle, whose weights are stored in the bundle",
            hint=f"flexmerge export {shlex.quote(str(bundle))} --task NAME --merged -o NAME",
        )
    return UsageError(
        f"{folder} is a task of a bundle, whose weights are stored in the bundle",
        hint=shlex.join(["flexmerge", "export", str(bundle), "--task", folder.name, "-o", folder.name]),
    )


def each_opened(opened: Callable[[Source], Opened], sources: Sequence[Source], names: Iterable[str]) -> list[Opened]:
    """Call `opened` on each source, in order; several at once if one of the names is a remote source, which takes time
    to answer."""
    from flexmerge_cli.checkpoint.place import is_remote

    return each(opened, sources, waits=any(map(is_remote, names)))


class _FileFolder(LocalFolder):
    """The folder of a file that the user named, which may be a link to anywhere."""

    def local(self, name: str) -> Path:
        return self.path / name


def _open_folder(
    source: str, folder: Folder, file: str | None, access: Access, *, side_files: bool = True
) -> Checkpoint:
    """Open a folder. file: the file that the user named. None: the folder's weights, with all files that belong to
    them."""
    tensors: dict[str, StoredTensor] = {}
    read: set[str] = set()
    if file is not None:
        path = folder.path / file
        where = str(path) if isinstance(folder, LocalFolder) else source
        if not file.endswith(WEIGHT_SUFFIXES):
            if (known := foreign.of_files([file])) is not None:
                raise SourceError(f"{where} is {known[1].what}", hint=known[1].hint)
            raise SourceError(
                f"{where} is not a weight file (its name ends in none of {', '.join(WEIGHT_SUFFIXES)})",
                hint="give a checkpoint folder or a weight file",
            )
        if (part := foreign.shards([file])) is not None:
            raise UsageError(
                f"{where} is one of the {part[1]} shards of a model", hint="give the folder that holds them"
            )
        tensors, read, _ = read_weights(folder, file)
        return _checkpoint(source, path, folder, access, tensors, read)
    found = _contents(source, folder, access)
    config = read_config(folder)
    parts: dict[str, str] = {}
    odd: list[str] = []
    for name, weights in found.weights.items():
        if weights in read:
            continue  # the source's own index names it as a shard
        place = inside(folder, name)
        own = _read_part(place, weights.rpartition("/")[2], read_config(place) if name else config)
        if name and (whole := _is_the_whole(own[0], tensors)):
            raise DataError(
                f"{folder.path / weights} is another checkpoint of the model, and no part of it: {whole} of its "
                f"{len(own[0])} tensors are those of {folder.path}",
                hint=f"give one of the two as the source, or --ignore {name}",
            )
        prefix = f"{name}/" if name else ""
        for inner, tensor in own[0].items():
            tensors[prefix + inner] = replace(tensor, name=prefix + inner) if name else tensor
            if part_of(prefix + inner, found.weights)[1] != inner:
                raise DataError(
                    f"{folder.path / weights}: tensor `{inner}` is called like one of a subfolder", hint="rename it"
                )
        read |= {prefix + file for file in own[1]}
        odd += own[2]
        parts |= {name: stem_of(weights)} if name else {}
    checkpoint = _checkpoint(source, folder.path, folder, access, tensors, read)
    left = {kind: tuple(name for name in names if name not in read) for kind, names in found.left().items()}
    wanted = found.side
    if access.with_code:
        wanted = tuple(sorted((*found.side, *left.pop("code", ()))))
    carried = [name for name in wanted if folder.is_file(name) and folder.size(name) <= MAX_SIDE_BYTES]
    left["other"] = (*left.get("other", ()), *(name for name in wanted if name not in carried))
    left["index"] = tuple(odd)
    _check_pointers(folder, carried)
    if side_files or isinstance(folder, LocalFolder):
        folder.bring(carried)
    return replace(
        checkpoint,
        config=config,
        side_files={name: folder.path / name for name in carried},
        parts=parts,
        license=read_license(folder.path / CARD_NAME) if CARD_NAME in carried else None,
        left={kind: names for kind, names in left.items() if names},
    )


def _check_pointers(folder: Folder, carried: Iterable[str]) -> None:
    """Raise DataError if this disk has only the pointer of Git LFS or git-annex for a tokenizer or the like."""
    for name in carried if isinstance(folder, LocalFolder) else ():
        if 0 < folder.size(name) <= MAX_POINTER_BYTES:
            found = foreign.of_bytes(
                read_file(folder.local(name), MAX_POINTER_BYTES, "a pointer")[: foreign.HEAD_BYTES]
            )
            if found is not None and "pointer" in found.what:
                raise DataError(f"{folder.path / name} is {found.what}", hint=found.hint)


def _is_the_whole(part: dict[str, StoredTensor], whole: dict[str, StoredTensor]) -> int:
    """Return how many tensors a subfolder and the source have in common, if that is most of the subfolder's; else 0."""
    common = sum(name in whole and whole[name].shape == tensor.shape for name, tensor in part.items())
    return common if 2 * common >= len(part) else 0


def _checkpoint(
    source: str, path: Path, folder: Folder, access: Access, tensors: dict[str, StoredTensor], read: Collection[str]
) -> Checkpoint:
    """Make a checkpoint. read: the weight files, by their paths in the folder."""
    remote = {folder.path / name: found for name in sorted(read) if (found := folder.remote(name)) is not None}
    if access.stream is not None and remote:
        tensors = _streamed(tensors, remote, access.stream)
    return Checkpoint(
        source=source,
        path=path,
        tensors=tensors,
        weight_bytes={folder.path / name: folder.size(name) for name in sorted(read)},
        remote=remote,
    )


def _contents(source: str, folder: Folder, access: Access) -> Contents:
    """List the files of a folder. Raises SourceError if there are no weights, and UsageError if it is unclear which to
    take."""
    names = folder.files(lambda name: is_left(name, access.ignore))
    regular = [name for name in names if name.endswith("/") or folder.is_file(name)]
    irregular = sorted(set(names) - set(regular))
    found = contents_of(regular, variant=access.variant, ignore=access.ignore)
    if not found.weights and irregular:
        name = min(irregular, key=lambda name: not name.endswith(WEIGHT_SUFFIXES))
        raise SourceError(
            f"no checkpoint in {folder.path}: {os.fsencode(name).decode(errors='replace')} is not a file, or is "
            "a link that leads nowhere",
            hint="get what it leads to: git annex get, or dvc pull",
        )
    if not found.weights:
        where = str(folder.path) if isinstance(folder, LocalFolder) else source
        raise no_weights(source, where, regular, access.variant)
    if access.variant is not None and not any(
        access.variant in variants([name.rpartition("/")[2]]) for name in found.weights.values()
    ):
        access.on_message(f"{source} has no variant {access.variant}: using its plain weights")
    if found.weights.get("") in ADAPTER_FILES:
        found = _beside_adapter(folder, found)
    return replace(found, other=(*found.other, *irregular))


def _beside_adapter(folder: Folder, found: Contents) -> Contents:
    """Sort what else lies beside an adapter: the value head of PPO. Raises UsageError for the weights of a whole
    model."""
    others = [name for name in (*found.copies, *found.indices) if name in WEIGHT_FILES and name not in ADAPTER_FILES]
    for name in others:
        if name in found.indices or not all(own.startswith("v_head.") for own in read_weight_file(folder, name)):
            raise UsageError(
                f"{folder.path} holds an adapter ({found.weights['']}) and the weights of a model ({name})",
                hint="move one of them to a folder of its own",
            )
    copies = tuple(name for name in found.copies if name not in others)
    return replace(found, copies=copies, value_heads=tuple(others))


def _read_part(
    folder: Folder, weights: str, config: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], set[str], list[str]]:
    """Read the tensors of one folder, the files that hold them, and what is odd about their index."""
    if scheme := by_config(config):
        raise DataError(f"{folder.path} is quantised: its config.json says {scheme}", hint=HINT)
    return read_weights(folder, weights)


def _streamed(
    tensors: dict[str, StoredTensor], remote: dict[Path, RemoteFile], pool: StreamPool
) -> dict[str, StoredTensor]:
    """Mark the tensors of remote files to be read in place."""
    odd = [tensor for tensor in tensors.values() if tensor.path in remote and tensor.strides is not None]
    if odd:
        raise UsageError(
            f"`{odd[0].name}` of {remote[odd[0].path].name} is not stored row by row, and cannot be streamed",
            hint="leave out --stream",
        )
    extents: dict[Path, list[tuple[int, int]]] = {path: [] for path in remote}
    for tensor in tensors.values():
        if tensor.path in remote:
            extents[tensor.path].append((tensor.offset, tensor.offset + tensor.num_bytes))
    files = {path: StreamedFile(remote[path], found) for path, found in extents.items()}
    pool.add(files.values())
    return {name: replace(tensor, stream=files.get(tensor.path)) for name, tensor in tensors.items()}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long for the file system
        return False


def find_weights(folder: Path) -> Path | None:
    """Find a weight file or index of a folder; None if it is not a checkpoint."""
    place = LocalFolder(folder)
    names = [child.name for child in folder.iterdir() if child.is_file()]
    if set(names) & set(COMPOSITES):
        names = place.files(lambda name: is_left(name, ()))
    found = list(contents_of(names).weights.values())
    name = found[0] if found else next((found[0] for found in variants(names).values()), None)
    return None if name is None else folder / name
