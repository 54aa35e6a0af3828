"""Makes the bundle that `merge` makes of a new plan, from the bundle of another plan of the same family.

The request that the old bundle records is applied to the new plan. What does not change is taken from the old bundle.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.publish import bundle_files, check_target
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.unchanged import MERGE, Unchanged, check_lineage, unchanged
from flexmerge_cli.errors import UsageError
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.recorded import Request, recorded
from flexmerge_cli.merging import merge
from flexmerge_cli.request.merge import MergeRequest, merge_request


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The comparison of a bundle with a plan. Made by `Update.of`."""

    plan: Plan
    request: MergeRequest
    layout: BundleLayout
    found: Unchanged

    @staticmethod
    def of(folder: Path, plan: Plan, *, device: str = "auto") -> "Update":
        """Read the bundle's manifest and headers, and no weights.

        Raises UsageError for a bundle of another family or one that was merged with a calibration, IntegrityError if
        one of its files is missing or truncated, GateError if the plan cannot be packed as requested.
        """
        from flexmerge_cli.engine.device import choose_device
        from flexmerge_cli.engine.product import build_of

        bundle = Bundle.look(folder)
        check_lineage(bundle, plan)
        bundle.check_tasks(bundle.tasks)
        assert bundle.manifest.request is not None
        request = asked(bundle.manifest.request)
        if request.calibration is not None:
            raise UsageError(
                f"{folder} was merged with a calibration, and the new plan has other tasks than that",
                hint="calibrate the new plan, and then: flexmerge merge PLAN --calibration FOLDER …",
            )
        layout = allocate(plan, request)
        build = build_of(layout, choose_device(device))
        return Update(plan=plan, request=request, layout=layout, found=unchanged(bundle, layout, build))

    def check(self, output: Path, plan_file: Path | None, *, force: bool) -> None:
        """Check that the new bundle goes to a new place or, with force, to that of the old one."""
        old = self.found.bundle.path
        check_apart(output, [plan_file, *([] if output.resolve() == old.resolve() else [old])])
        check_target(output, force=force, ours=bundle_files)

    def write(self, output: Path, **options: Any) -> Measured:
        """Write the new bundle. options: those of `merging.merge`, including plan_folder. Raises what that raises."""
        return merge(self.plan, self.request, output, layout=self.layout, old=self.found, **options)[1]


def asked(request: Request) -> MergeRequest:
    """Parse the request that a bundle records. Raises UsageError for a method from a file, which no bundle contains."""
    words = request.dump()
    del words["command"]
    found = merge_request(**words)
    if recorded(found).dump() != request.dump():
        raise UsageError("the bundle records a request that this version understands otherwise", hint=MERGE)
    return found
