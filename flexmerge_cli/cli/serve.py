"""`flexmerge serve`."""

from typing import Annotated

from flexmerge_cli.cli import options as o


def serve(
    bundle: o.Bundle,
    port: Annotated[int, o.option("--port", "N", "Port to listen on; 0 chooses a free one.", min=0, max=65535)] = 8000,
    host: Annotated[
        str, o.option("--host", "ADDRESS", "Address to listen on. There is no authentication.")
    ] = "127.0.0.1",
    tasks: Annotated[list[str] | None, o.option("--tasks", "NAME…", "Tasks to serve; default: all.")] = None,
    weights: Annotated[
        str, o.option("--weights", "dense|packed", "Keep coded weights decoded, or as they are stored.")
    ] = "dense",
    device: o.Device = "cpu",
    max_memory: o.MaxMemory = None,
    max_batch: Annotated[int, o.option("--max-batch", "N", "Largest number of inputs computed at once.", min=1)] = 32,
    max_wait: Annotated[
        float, o.option("--max-wait", "MS", "Milliseconds that a batch waits for more inputs.", min=0, max=60_000)
    ] = 5.0,
    max_queue: Annotated[
        int, o.option("--max-queue", "N", "Largest number of waiting inputs; more are refused with 503.", min=1)
    ] = 1024,
    max_tokens: Annotated[int, o.option("--max-tokens", "N", "Limit on the tokens of a generated text.", min=1)] = 1024,
    max_body: Annotated[str, o.option("--max-body", "BYTES", "Limit on the size of a request, e.g. 16MiB.")] = "16MiB",
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Answer requests over HTTP with the tasks of a bundle: OpenAI's API for language models, predictions for others.

    Ctrl-C or SIGTERM finishes running requests, then stops the server. Nothing is loaded from the network.

    \b
    Examples:
    flexmerge serve bundle/
    flexmerge serve bundle/ --tasks sst2 cola --port 8080
    """
    from flexmerge_cli.bundle.locate import locate
    from flexmerge_cli.checkpoint.place import is_hub, is_remote
    from flexmerge_cli.cli.output import emit, note
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.evaluation.loading import require
    from flexmerge_cli.request.size import parse_bytes

    if is_remote(bundle) and not is_hub(bundle):
        raise UsageError(f"{bundle}: serve loads nothing from the network", hint="copy the bundle to this disk first")
    require("fastapi", "uvicorn", "prometheus_client", "transformers", extra="flexmerge-cli[serve]")
    from flexmerge_cli.server.run import ServerSettings, bound_socket, make_service, url_of
    from flexmerge_cli.server.run import serve as run

    settings = ServerSettings(
        tasks=tasks,
        weights=weights,
        device=device,
        max_memory=o.memory_of(max_memory),
        max_batch=max_batch,
        max_wait=max_wait / 1000,
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_body=parse_bytes(max_body),
    )
    with bound_socket(host, port) as listener:
        opened = locate(bundle, o.access_of(offline=True, quiet=quiet), tasks=tasks).open()
        service = make_service(opened, settings)
        value = {"url": url_of(listener), "tasks": {name: task.kind for name, task in service.tasks.items()}}

        def show(_value: object) -> None:
            print(f"serving {', '.join(service.tasks)} on {value['url']}")

        run(service, listener, lambda: emit(value, as_json=as_json, quiet=quiet, show=show))
    note("stopped", quiet=quiet)
