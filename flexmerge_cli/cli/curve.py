"""`flexmerge curve`."""

import shlex

from flexmerge_cli.cli import options as o


def curve(
    plan: o.PlanFile,
    spec: o.Spec = None,
    sizes: o.Sizes = None,
    method: o.CurveMethods = None,
    step: o.Step = None,
    calibrate: o.Calibrate = None,
    calibration: o.Calibration = None,
    method_for: o.MethodFor = None,
    fit: o.Fit = None,
    cluster: o.Cluster = None,
    seed: o.ClusterSeed = None,
    dtype: o.Dtype = None,
    no_reuse: o.NoReuse = False,
    parallel: o.Parallel = 1,
    csv: o.Csv = None,
    html: o.Html = None,
    png: o.Png = None,
    max_drop: o.MaxDrop = None,
    max_mean_drop: o.MaxMeanDrop = None,
    choose: o.Choose = None,
    tune_spec: o.TuneSpec = None,
    tune: o.Tune = None,
    ensembles: o.Ensembles = False,
    plane: o.Plane = None,
    allow_exec: o.AllowExec = False,
    relocate: o.Relocate = None,
    offline: o.Offline = False,
    stream: o.Stream = False,
    device: o.Device = "auto",
    threads: o.Threads = None,
    max_memory: o.MaxMemory = None,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Draw accuracy against size, without writing bundles.

    Scores the tasks of a plan by each method at each size.

    \b
    Examples:
    flexmerge curve plan.json --spec eval.yaml --sizes 1x:8x:1x --method auto --method emr --html curve.html
    flexmerge curve plan.json --spec eval.yaml --sizes 1x,2x --method auto --method low_bit --choose 0.99
    """
    from flexmerge_cli.cli.eval_outputs import check_outputs, write_outputs
    from flexmerge_cli.cli.gating import finish
    from flexmerge_cli.cli.output import progress
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.evaluation.curve_document import DEFAULT_METHODS, curve_document
    from flexmerge_cli.evaluation.gate import parse_gate
    from flexmerge_cli.report.curve import show_curve

    memory = o.memory_of(max_memory)
    again = f"--spec {shlex.quote(str(spec or 'eval.yaml'))}"
    if plan.is_dir():
        place = shlex.quote(str(plan))
        raise UsageError(f"{plan} is a folder, not a plan", hint=f"to score a bundle: flexmerge eval {place} {again}")
    if spec is None:
        raise UsageError(
            "no --spec: the data to score each task on", hint=f"flexmerge curve {shlex.quote(str(plan))} {again}"
        )
    outputs = {kind: path for kind, path in (("csv", csv), ("html", html), ("png", png)) if path}
    check_outputs(outputs, (plan, spec, tune_spec), force=force)
    words = {
        "steps": step or (),
        "calibrate": calibrate,
        "calibration": str(calibration) if calibration else None,
        "method_for": method_for or (),
        "fit": fit,
        "cluster": cluster,
        "seed": seed,
        "dtype": dtype,
    }
    with progress(quiet=quiet or as_json, verbose=verbose, counts=True) as on_score:
        document = curve_document(
            plan,
            spec,
            methods=method or DEFAULT_METHODS,
            sizes=sizes,
            words=words,
            gate=parse_gate(max_drop, max_mean_drop),
            target=choose,
            tune=tune,
            tune_spec_path=tune_spec,
            allow_exec=allow_exec,
            on_score=on_score,
            relocate=o.relocations(relocate),
            access=o.access_of(offline=offline, quiet=quiet, stream=stream, max_memory=memory),
            reuse=not no_reuse,
            ensembles=ensembles,
            plane=plane,
            parallel=parallel,
            device=device,
            threads=threads,
            max_memory=memory,
        )
        write_outputs(document, outputs, plan.name)
    finish(document, f"{plan}", as_json=as_json, quiet=quiet, show=show_curve, written=[*outputs.values()])
