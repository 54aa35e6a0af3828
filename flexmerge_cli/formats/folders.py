"""Where the files of a bundle lie below its folder. Pure."""

from collections.abc import Collection

from flexmerge_cli.checkpoint.libraries import shard_names

BASE_FOLDER = "base"
WEIGHTS = "weights/"
CODED_README = "README.md"
MAX_NAME_BYTES = 255  # of one folder or file, on every file system in use


def side_folder(task: str, *, coded: bool) -> str:
    """coded: the task must be decoded; loaders find no config in the folder of its name."""
    return f"coded/{task}/files" if coded else f"tasks/{task}"


def base_files_folder(*, coded: bool) -> str:
    """The same of the base of kept adapters."""
    return f"{BASE_FOLDER}/files" if coded else BASE_FOLDER


def linked_names(folder: str, stem: str | None, route: Collection[str]) -> dict[str, str]:
    """Path of each link in a folder -> the weight file to which it leads; none without a stem."""
    names = shard_names(stem, len(route)) if stem is not None else []
    return {f"{folder}/{name}": path for name, path in zip(names, sorted(route))}


def stays_inside(path: str) -> bool:
    """weights/FILE, tasks/NAME/…, coded/NAME/… or base/FILE, of names that every disk can hold."""
    folder, *below = path.split("/")
    return (
        folder in ("weights", "tasks", "coded", BASE_FOLDER)
        and below != []
        and not set(below) & {"", ".", ".."}
        and not any(character in path for character in ("\\", ":", "\0"))
        and all(len(name.encode()) <= MAX_NAME_BYTES for name in below)
    )
