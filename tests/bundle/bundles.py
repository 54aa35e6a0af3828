"""Bundles for the tests of reading, in a copy of their own each; and manifests changed and sealed again."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.errors import FlexmergeError

from ..families import ODD, write_family
from ..hostile import sealed
from ..program import succeeds


def make(root: Path, *options: object, name: str = "heads", layout: str = "file") -> Path:
    """A bundle of one of the odd families; the plan beside it."""
    folders = write_family(root, ODD[name](), layout=layout)
    succeeds("plan", "-q", *folders.arguments, "-o", root / "plan.json")
    succeeds("merge", root / "plan.json", *options, "-o", root / "bundle")
    return root / "bundle"


def copy(bundle: Path, target: Path) -> Path:
    """Copy a bundle with hard links of its own, as they were."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(bundle, target, symlinks=True)
    return target


def manifest_of(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_bytes())


def seal(bundle: Path, fields: object) -> None:
    (bundle / "manifest.json").write_bytes(sealed(fields, "id"))


def changed(bundle: Path, target: Path, change: Callable[[dict], object]) -> Path:
    """Copy a bundle, change the manifest of the copy, and seal it again."""
    fields = manifest_of(copy(bundle, target))
    change(fields)
    seal(target, fields)
    return target


def seal_file(bundle: Path, name: str) -> None:
    """Have the manifest tell of a file as it is now, and seal it again."""
    fields, data = manifest_of(bundle), (bundle / name).read_bytes()
    fields["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seal(bundle, fields)


def flip(path: Path, place: int = -1, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def reads_or_says_why(bundle: Path) -> None:
    """A damaged bundle: every tensor of every task, and the whole verified; or an error of unsound data."""
    try:
        opened = open_bundle(bundle)
        for task in opened.tasks:
            for name, value in opened.view(task).items():
                assert value.numel() >= 0, name
        verify(bundle, decode=True)
    except FlexmergeError as error:
        assert error.exit_code in (3, 5)
