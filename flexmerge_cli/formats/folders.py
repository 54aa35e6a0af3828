"""Says where the files of a bundle lie below its folder. Pure."""

from collections.abc import Collection, Iterable

from flexmerge_cli.checkpoint.libraries import shard_names

BASE_FOLDER = "base"
WEIGHTS = "weights/"
CODED_README = "README.md"
ASIDE = ".aside"  # after the name of every side file of a model that must be decoded: a loader finds no config
ROUTER = "router"
ROUTER_FILE = f"{ROUTER}/router.safetensors"
SURGERY = "surgery"
SURGERY_FILE = f"{SURGERY}/surgery.safetensors"
WEMOE = "wemoe"
WEMOE_FILE = f"{WEMOE}/wemoe.safetensors"
ADDED = {ROUTER: ROUTER_FILE, SURGERY: SURGERY_FILE, WEMOE: WEMOE_FILE}
"""The folder of each file that was added to a bundle after its merge, and belongs to no tensor."""
MAX_NAME_BYTES = 255  # for one folder or file: the limit of common file systems


def side_folder(task: str, *, coded: bool) -> str:
    """Return the folder of a task's side files. coded: the task must be decoded before a loader can read it."""
    return f"coded/{task}" if coded else f"tasks/{task}"


def side_path(folder: str, name: str, *, coded: bool) -> str:
    """Return where a side file lies in the bundle. name: what it is called in its checkpoint."""
    return f"{folder}/{name}{ASIDE if coded else ''}"


def side_files(folder: str, paths: Iterable[str], *, coded: bool) -> dict[str, str]:
    """Map what each side file of a folder is called in its checkpoint to its path in the bundle."""
    prefix = f"{folder}/"
    found = {path.removeprefix(prefix): path for path in paths if path.startswith(prefix)}
    if not coded:
        return found
    found.pop(CODED_README, None)
    if all(name.endswith(ASIDE) for name in found):
        return {name.removesuffix(ASIDE): path for name, path in found.items()}
    # Older bundles have them under their own names in a subfolder.
    return {name.removeprefix("files/"): path for name, path in found.items() if name.startswith("files/")}


def linked_names(folder: str, stem: str | None, route: Collection[str]) -> dict[str, str]:
    """Map the path of each link in a folder to the weight file to which it leads; empty without a stem."""
    names = shard_names(stem, len(route)) if stem is not None else []
    return {f"{folder}/{name}": path for name, path in zip(names, sorted(route))}


def stays_inside(path: str) -> bool:
    """Return whether a path is weights/FILE, tasks/NAME/…, coded/NAME/…, base/FILE, or FILE in a folder of `ADDED`,
    with names that every disk can hold."""
    folder, *below = path.split("/")
    return (
        folder in ("weights", "tasks", "coded", BASE_FOLDER, *ADDED)
        and below != []
        and not set(below) & {"", ".", ".."}
        and not any(character in path for character in ("\\", ":", "\0"))
        and all(len(name.encode()) <= MAX_NAME_BYTES for name in below)
    )
