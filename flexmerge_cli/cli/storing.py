"""Lets `merge` write to an address: it makes the bundle in a folder of the cache, and sends it.

The folder is the same for every run of this user with the same address, so that a run that was killed is continued.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.store import check_store, push_to_store
from flexmerge_cli.bundle.unchanged import Unchanged, unchanged
from flexmerge_cli.checkpoint.place import is_hub, is_remote
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.cache import cache_folder
from flexmerge_cli.merging_sizes import is_there


@dataclass(frozen=True, slots=True, kw_only=True)
class AtStore:
    """The address to which a bundle goes, and the folder where it is made before."""

    address: str
    folder: Path
    offline: bool

    @staticmethod
    def of(output: str, *, force: bool, offline: bool) -> "AtStore | None":
        """Check that the bundle may go to an address; None if it is a folder on this disk.

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
        name = hashlib.sha256(output.rstrip("/").encode()).hexdigest()[:16]
        return AtStore(address=output, folder=cache_folder().parent / "uploads" / name / "bundle", offline=offline)

    def unchanged(self, layout: BundleLayout, device: str) -> Unchanged | None:
        """Return the bundle that a killed run has made but not sent, if it is the one that this run makes."""
        from flexmerge_cli.engine.device import choose_device
        from flexmerge_cli.engine.product import build_of

        build = build_of(layout, choose_device(device))
        if layout.calibration is not None or not is_there(self.folder, layout, build):
            return None
        return unchanged(Bundle.open(self.folder), layout, build)

    def send(self, on_progress: Callable[[str, int, int], None]) -> None:
        push_to_store(self.folder, self.address, offline=self.offline, on_progress=on_progress)

    def done(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)
