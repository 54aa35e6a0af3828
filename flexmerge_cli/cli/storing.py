"""Lets `merge` write to an address: it makes the bundle in a folder of the cache, and sends it.

The folder is the same for every run of this user with the same address, so that a run that was killed is continued.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.bundle.publish import partial_folder
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.store import PARTS, Store, check_store, push_to_store
from flexmerge_cli.bundle.unchanged import Unchanged, unchanged
from flexmerge_cli.checkpoint.place import is_hub, is_remote
from flexmerge_cli.cli.packing import Packing
from flexmerge_cli.engine.journal import read_journals
from flexmerge_cli.errors import IntegrityError, UsageError, show_as
from flexmerge_cli.evaluation.cache import cache_folder
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.merging import OnProgress
from flexmerge_cli.merging_sizes import is_there
from flexmerge_cli.request.part import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class AtStore:
    """The address to which a bundle goes, and the folder where it is made before."""

    address: str
    folder: Path
    offline: bool

    @staticmethod
    def of(output: str, *, force: bool, offline: bool, part: Share | None = None) -> "AtStore | None":
        """Check that the bundle, or a part of it, may go to an address; None if it is a folder on this disk.

        Raises UsageError for a repository of the Hub, to which `push` sends a bundle in one commit.
        """
        if not is_remote(output):
            return None
        if is_hub(output):
            raise UsageError(
                f"{output}: merge writes no repository",
                hint=f"write a folder, and then: flexmerge push FOLDER {output}",
            )
        check_store(output, force=force, offline=offline)
        name = hashlib.sha256(f"{output.rstrip('/')} {part or ''}".encode()).hexdigest()[:16]
        folder = cache_folder().parent / "uploads" / name / "bundle"
        for place in (folder, partial_folder(folder)):
            show_as(place, output)
        return AtStore(address=output, folder=folder, offline=offline)

    def unchanged(self, layout: BundleLayout, device: str) -> Unchanged | None:
        """Return the bundle that a killed run has made but not sent, if it is the one that this run makes."""
        from flexmerge_cli.engine.device import choose_device
        from flexmerge_cli.engine.product import build_of

        build = build_of(layout, choose_device(device, computes=False))
        if layout.calibration is not None or not is_there(self.folder, layout, build):
            return None
        return unchanged(Bundle.open(self.folder), layout, build)

    def write(
        self, packing: Packing, plan: Plan, layout: BundleLayout, *, device: str, on_progress: OnProgress, **run: Any
    ) -> Measured | None:
        """Make the bundle, or a part of it, and send it. Returns None for a part, and leaves one that is there."""
        from flexmerge_cli.bundle.parts import merge_key
        from flexmerge_cli.bundle.store_parts import fetch_parts, has_part, remove_parts, send_part
        from flexmerge_cli.engine.device import choose_device

        whole_key = merge_key(layout, choose_device(device, computes=False))
        key, partial = whole_key[:16], partial_folder(self.folder)
        if read_journals(partial, whole_key).of_another:
            shutil.rmtree(partial)  # What a killed run of another merge left is of no use, and nobody else sees it.
        store = Store.at(self.address, offline=self.offline)
        options = run | {"device": device, "on_progress": on_progress, "force": True}
        if packing.part is not None:
            if not has_part(store, key, packing.part):
                packing.write(plan, layout, self.folder, **options)
                send_part(store, layout, self.folder, key, packing.part, on_progress)
            self.done()
            return None
        old = self.unchanged(layout, device)
        if packing.join and old is None:
            fetch_parts(store, layout, self.folder, key, on_progress)
        is_joined, packing.join = packing.join, packing.join and old is None
        try:
            written = packing.write(plan, layout, self.folder, old=old, **options)
        except IntegrityError as error:
            if packing.join:  # A part that is finished in the store is not made again.
                error.hint = f"remove the journals of these parts from {self.address}/{PARTS}{key}, and {error.hint}"
            raise
        push_to_store(self.folder, self.address, offline=self.offline, on_progress=on_progress)
        if is_joined:
            remove_parts(store)
        return written

    def done(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)
