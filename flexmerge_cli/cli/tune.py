"""`flexmerge tune`."""

from pathlib import Path
from typing import Annotated, Any

from flexmerge_cli.cli import options as o


def tune(
    plan: o.PlanFile,
    spec: o.Spec = None,
    output: Annotated[
        Path | None, o.option("-o", "--output", "PATH", "Where to write the coefficients, or the new bundle.")
    ] = None,
    method: Annotated[
        str,
        o.option(
            "--method",
            "NAME[:KEY=VALUE,…]",
            "How to find the weights: adamerging, concrete or fw_merging. With --bundle: surgery or wemoe.",
        ),
    ] = "adamerging",
    bundle: Annotated[
        str | None, o.option("--bundle", "FOLDER", "With surgery or wemoe: the bundle to which it adds.")
    ] = None,
    examples: o.Examples = 256,
    relocate: o.Relocate = None,
    offline: o.Offline = False,
    stream: o.Stream = False,
    device: o.Device = "auto",
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Find a weight for each task and block on unlabelled examples, for `merge --method weighted_average`.

    \b
    Examples:
    flexmerge tune plan.json --spec calib.yaml -o coefficients.json
    flexmerge merge plan.json --method weighted_average:weights=@coefficients.json,normalize=count --size 1x -o bundle/
    flexmerge tune plan.json --spec calib.yaml --method surgery:rank=16 --bundle bundle/ -o corrected/
    flexmerge tune plan.json --spec calib.yaml --method wemoe --bundle experts/ -o mixed/
    """
    from flexmerge_cli.bundle.locate import locate
    from flexmerge_cli.calibration.tune import fitting_request, tune, tune_request
    from flexmerge_cli.cli import output as out
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.report.tune import fitting_summary, show_fitting, show_tune, tune_summary

    if spec is None:
        raise UsageError("no --spec: the examples of each task", hint="--spec calib.yaml, written as for `eval`")
    if output is None:
        raise UsageError("no output given", hint=f"add -o {'coefficients.json' if bundle is None else 'corrected/'}")
    access = o.access_of(offline=offline, quiet=quiet, stream=stream)
    asked: dict[str, Any] = {"examples": examples, "device": None if device == "auto" else device, "access": access}
    asked["relocate"] = o.relocations(relocate)
    if bundle is not None:
        fit = fitting_request(plan, spec, method=method, bundle=locate(bundle, access).open(), **asked)
        with out.progress(quiet=quiet or as_json, verbose=verbose, counts=True) as on_step:
            fitted = fit(output, force=force, on_step=on_step)
        summary = fitting_summary(method.partition(":")[0], fitted, output)
        out.emit(summary, as_json=as_json, quiet=quiet, show=show_fitting, written=[output])
        return
    request = tune_request(plan, spec, method=method, **asked)
    with out.progress(quiet=quiet or as_json, verbose=verbose, counts=True) as on_step:
        found = tune(request, output, force=force, on_step=on_step)
    value = tune_summary(found, output)
    out.emit(value, as_json=as_json, quiet=quiet, show=show_tune, written=[output])
