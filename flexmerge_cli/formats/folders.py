"""Says where the files of a bundle lie below its folder. Pure."""

from collections.abc import Collection

from flexmerge_cli.checkpoint.libraries import shard_names

BASE_FOLDER = "base"
WEIGHTS = "weights/"
CODED_README = "README.md"
ROUTER = "router"
ROUTER_FILE = f"{ROUTER}/router.safetensors"
MAX_NAME_BYTES = 255  # for one folder or file: the limit of common file systems


def side_folder(task: str, *, coded: bool) -> str:
    """Return the folder of a task's side files. coded: the task must be decoded, so the folder of its name has no
    config that a loader could find."""
    return f"coded/{task}/files" if coded else f"tasks/{task}"


def base_files_folder(*, coded: bool) -> str:
    """Return the folder of the side files of the base of kept adapters."""
    return f"{BASE_FOLDER}/files" if coded else BASE_FOLDER


def linked_names(folder: str, stem: str | None, route: Collection[str]) -> dict[str, str]:
    """Map the path of each link in a folder to the weight file to which it leads; empty without a stem."""
    names = shard_names(stem, len(route)) if stem is not None else []
    return {f"{folder}/{name}": path for name, path in zip(names, sorted(route))}


def stays_inside(path: str) -> bool:
    """Return whether a path is weights/FILE, tasks/NAME/…, coded/NAME/…, base/FILE or router/FILE, with names that
    every disk can hold."""
    folder, *below = path.split("/")
    return (
        folder in ("weights", "tasks", "coded", BASE_FOLDER, ROUTER)
        and below != []
        and not set(below) & {"", ".", ".."}
        and not any(character in path for character in ("\\", ":", "\0"))
        and all(len(name.encode()) <= MAX_NAME_BYTES for name in below)
    )
