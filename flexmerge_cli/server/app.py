"""Makes the application: routes of predictions, models, health and metrics, and errors in the form of OpenAI's API."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from flexmerge_cli.server.completions import add_completions
from flexmerge_cli.server.embeddings import add_embeddings
from flexmerge_cli.server.generation import Choice
from flexmerge_cli.server.limits import BoundedBodies
from flexmerge_cli.server.metrics import MeasuredApp
from flexmerge_cli.server.refusal import Refusal
from flexmerge_cli.server.requests import Predict
from flexmerge_cli.server.service import Service
from flexmerge_cli.server.tasks import Task
from flexmerge_cli.version import VERSION

STOP_SECONDS = 10.0
"""How long running work may take to end after clients are gone."""


def make_app(service: Service) -> FastAPI:
    """Make the application. It starts the worker when it starts, and stops it when it stops."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop(STOP_SECONDS)

    # The pages that FastAPI makes from the schema load their scripts from the network.
    app = FastAPI(title="flexmerge", version=VERSION, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(BoundedBodies, max_bytes=service.max_body)
    app.add_middleware(MeasuredApp, metrics=service.metrics)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)

    @app.get("/health")
    async def health() -> Any:
        if not service.worker.is_alive:
            raise Refusal("the server is stopping", status=503, code="stopping")
        return {"status": "ok", "tasks": len(service.tasks), "waiting": service.worker.num_waiting}

    @app.get("/metrics")
    async def metrics() -> Any:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model(task) for task in service.tasks.values()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Any:
        return _model(service.task(name))

    @app.post("/v1/tasks/{name}/predict")
    async def predict(name: str, body: Predict, request: Request) -> Any:
        task = service.task(name)
        service.worker.require_room(len(body.inputs))
        items = await service.prepared(
            lambda: [task.prepare(value, max_tokens=body.max_tokens) for value in body.inputs]
        )
        answers = await service.answers(name, items, request.receive)
        return {"task": name, "kind": task.kind, "outputs": [_output(answer) for answer in answers]}

    add_completions(app, service)
    add_embeddings(app, service)
    return app


def _model(task: Task) -> dict[str, Any]:
    found = {"id": task.name, "object": "model", "created": 0, "owned_by": "flexmerge", "kind": task.kind}
    labels = getattr(task, "labels", None)
    return found | ({"labels": labels} if labels and task.kind != "regression" else {})


def _output(answer: Any) -> Any:
    if not isinstance(answer, Choice):
        return answer
    return {"text": answer.text, "finish_reason": answer.finish, "tokens": len(answer.tokens)}


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Refuse a body that is not JSON, or whose keys are wrong."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        said = f"the body is not valid JSON: {errors[0].get('ctx', {}).get('error', '')}"
        return await _refused(request, Refusal(said))
    # A value that may have several forms has an error for each: the form that it fits best fails deepest inside it.
    places = [_place(one, error.body) for one in errors]
    place = max((own for own in places if own[:1] == places[0][:1]), key=len)
    said = " or ".join(dict.fromkeys(_said(one) for one, own in zip(errors, places) if own == place))
    key = ".".join(place[:20])
    return await _refused(request, Refusal(f"{key or 'the body'}: {said}", param=place[0] if place else None))


def _place(error: Any, body: Any) -> list[str]:
    """Return the keys and indices that lead to an error, whose `loc` also names the types that were tried."""
    found, value = [], body
    for step in error["loc"][1:]:
        try:
            value = value[step]
        except (LookupError, TypeError):
            if error["type"] != "missing" or step != error["loc"][-1]:
                continue
        found.append(str(step)[:100])
    return found


def _said(error: Any) -> str:
    known = {
        "extra_forbidden": "this key is not supported", "missing": "it is required", "model_attributes_type":
        "it must be a JSON object", "string_unicode": "it contains half of a surrogate pair, which is not a character",
    }  # fmt: skip
    return known.get(error["type"]) or re.sub("^(Input|List|String) should", "it must", str(error["msg"])[:500])


async def _http(request: Request, error: Exception) -> JSONResponse:
    """Refuse a route or method that does not exist, or a body that cannot be parsed."""
    assert isinstance(error, HTTPException)
    known = {
        400: "the body cannot be parsed: it is not UTF-8, is nested too deeply, or has a number with too many digits",
        404: f"there is no route {request.url.path[:200]}",
        405: f"{request.url.path[:200]} does not take {request.method[:20]}",
    }
    said = known.get(error.status_code, str(error.detail))
    return await _refused(request, Refusal(said, status=error.status_code))


async def _failed(request: Request, _error: Exception) -> JSONResponse:
    """Answer a bug with status 500; it is logged elsewhere."""
    return await _refused(request, Refusal("the server failed", status=500))
