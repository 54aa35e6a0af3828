"""`flexmerge calibrate`."""

from flexmerge_cli.cli import options as o


def calibrate(
    plan: o.PlanFile,
    spec: o.Spec = None,
    output: o.CalibrationOutput = None,
    statistics: o.CalibrationStatistics = None,
    examples: o.Examples = 256,
    through: o.Through = None,
    size: o.Size = None,
    relocate: o.Relocate = None,
    offline: o.Offline = False,
    stream: o.Stream = False,
    device: o.Device = "auto",
    dry_run: o.DryRun = False,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Run each fine-tuned model of a plan on a few examples, and save the statistics that methods such as regmean need.

    \b
    Examples:
    flexmerge calibrate plan.json --spec calib.yaml -o calibration/
    flexmerge merge plan.json --method regmean --calibration calibration/ --size 1x -o bundle/
    flexmerge calibrate plan.json --spec calib.yaml --through regmean --size 1x -o through/
    """
    from flexmerge_cli.calibration.make import calibrate, check_calibration_place, expected_sizes
    from flexmerge_cli.calibration.request import calibration_request
    from flexmerge_cli.cli import output as out
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.report.calibration import calibration_summary, show_calibration

    if spec is None:
        raise UsageError("no --spec: the examples of each task", hint="--spec calib.yaml, written as for `eval`")
    if output is None and not dry_run:
        raise UsageError("no output folder given for the calibration", hint="add -o calibration/")
    request = calibration_request(
        plan,
        spec,
        statistics=statistics,
        examples=examples,
        through=through,
        size=size,
        device=None if device == "auto" else device,
        relocate=o.relocations(relocate),
        access=o.access_of(offline=offline, quiet=quiet, stream=stream),
    )
    if dry_run or output is None:
        if output is not None:
            check_calibration_place(output, request, force=force)
        value = calibration_summary(expected_sizes(request), output, written=False)
    else:
        with out.progress(quiet=quiet or as_json, verbose=verbose, counts=True) as on_step:
            found = calibrate(request, output, force=force, on_step=on_step)
        value = calibration_summary(found, output, written=True)
    written = [output] if output is not None and not dry_run else []
    out.emit(value, as_json=as_json, quiet=quiet, show=show_calibration, written=written)
