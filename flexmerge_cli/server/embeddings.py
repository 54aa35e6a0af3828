"""Serves OpenAI's embeddings API for the tasks that make embeddings of texts."""

import base64
from typing import Any

import numpy as np
from fastapi import FastAPI, Request

from flexmerge_cli.server.encoders import Embeddings
from flexmerge_cli.server.refusal import Refusal
from flexmerge_cli.server.requests import Embedded
from flexmerge_cli.server.service import Service


def add_embeddings(app: FastAPI, service: Service) -> None:
    """Add the route `/v1/embeddings`."""

    @app.post("/v1/embeddings")
    async def embeddings(body: Embedded, request: Request) -> Any:
        task = service.task(body.model)
        if not isinstance(task, Embeddings):
            raise Refusal(f"task `{body.model}` is {task.kind}, which makes no embeddings of texts", param="model")
        texts = [body.input] if isinstance(body.input, str) else body.input
        service.worker.require_room(len(texts))
        items = await service.prepared(lambda: [task.prepare(text) for text in texts])
        answers = await service.answers(body.model, items, request.receive)
        count = sum(len(item["input_ids"]) for item in items)
        data = [
            {"object": "embedding", "index": number, "embedding": _written(answer["embedding"], body.encoding_format)}
            for number, answer in enumerate(answers)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "model": body.model, "data": data, "usage": usage}


def _written(values: list[float], form: str) -> list[float] | str:
    return values if form == "float" else base64.b64encode(np.array(values, "<f4").tobytes()).decode()
