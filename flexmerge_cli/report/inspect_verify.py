"""Shows the result of `inspect --verify`: bad files, their damaged parts, and the tasks that are broken or sound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.verify import verify_bundle
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.errors import FlexmergeError, IntegrityError
from flexmerge_cli.report.inspect_bundle import part_tensors
from flexmerge_cli.report.table import say
from flexmerge_cli.report.text import printable

SHOWN = 20  # damaged parts that are named per file


def verification(bundle: Bundle, *, decode: bool, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    """Verify a bundle that `Bundle.look` opened, so that all problems with its files are found here."""
    found = verify_bundle(bundle, decode=decode, on_bytes=on_bytes)
    return {
        "kind": "bundle",
        "bundle": str(bundle.path),
        "id": bundle.manifest.id,
        "verification": {
            "sound": not found.bad,
            "files": found.num_files,
            "tensors": found.num_tensors,
            "bad": found.bad,
            "damaged": damaged_parts(bundle.path, [name for name in found.bad if name in bundle.manifest.files]),
            "broken_tasks": list(found.broken_tasks),
            "sound_tasks": list(found.sound_tasks),
            "unknown": list(found.unknown),
        },
    }


def damaged_parts(path: Path, files: list[str]) -> dict[str, list[str]]:
    """Return the parts of bad files whose tensors cannot be read, or no longer decode to what was written.

    There are none for a file that is missing or cut, or whose damage lies in its header or padding.
    """
    try:
        bundle = Bundle.look(path, verify="off")
    except FlexmergeError:  # replaced meanwhile
        return {}
    return {file: _damaged(bundle, file) for file in files if file in bundle.parts}


def _damaged(bundle: Bundle, file: str) -> list[str]:
    manifest = bundle.manifest
    tensors = {tensor.name: tensor for tensor in manifest.stored}
    units = {unit.name: unit.tensors for unit in manifest.units}
    readers = set(manifest.files[file].tasks) & set(bundle.sound_tasks)
    found = []
    for part, of in part_tensors(bundle, file).items():
        names = [of] if of in tensors else units.get(of, ())
        wanted = [
            (name, task, digest) for name in names for task, digest in tensors[name].digests.items() if task in readers
        ]
        if any(_digest(bundle, name, task) != digest for name, task, digest in wanted):
            found.append(part)
    return found


def _digest(bundle: Bundle, name: str, task: str) -> str | None:
    """Return the digest of a tensor; None if it cannot be read."""
    try:
        return digest_bytes(np.ascontiguousarray(bundle.stored(task, name)).reshape(-1).view(np.uint8))
    except FlexmergeError:
        return None


def failure(value: dict[str, Any]) -> IntegrityError | None:
    """Return the error of a damaged bundle."""
    found = value["verification"]
    if found["sound"]:
        return None
    broken, sound = found["broken_tasks"], found["sound_tasks"]
    hint = f"sound still: {', '.join(sound)}; " if sound else ""
    return IntegrityError(
        printable(
            f"{value['bundle']} is damaged: bad parts ({len(found['bad'])}) break {', '.join(broken) or 'no task'}"
        ),
        hint=printable(f"{hint}fetch the bundle again, or merge again"),
    )


def show_verification(value: dict[str, Any]) -> None:
    found = value["verification"]
    say(f"{value['bundle']}: id {value['id']}")
    for name, problem in found["bad"].items():
        say(f"bad: {name}: {problem}")
        parts = found["damaged"].get(name, [])
        for part in parts[:SHOWN]:
            say(f"     part {part}")
        if len(parts) > SHOWN:
            say(f"     and {len(parts) - SHOWN} more parts")
    for name in found["unknown"]:
        say(f"not of this bundle: {name}")
    decoded = f", {found['tensors']:,} decoded tensors" if found["tensors"] else ""
    say(f"checked {found['files']} files{decoded}: {'sound' if found['sound'] else 'damaged'}")
    if not found["sound"]:
        say(f"broken tasks: {', '.join(found['broken_tasks']) or 'none'}")
        say(f"sound tasks: {', '.join(found['sound_tasks']) or 'none'}")
