"""Serves OpenAI's completions and chats of causal language models, whole or as a stream of server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from flexmerge_cli.server.generation import Choice
from flexmerge_cli.server.refusal import Refusal
from flexmerge_cli.server.requests import Chat, Completion, Generation
from flexmerge_cli.server.service import Service
from flexmerge_cli.server.tasks import CausalLM

USUAL_TOKENS = 16
"""The default tokens of a completion, as in OpenAI's API. A chat takes as many as the limits allow."""


def add_completions(app: FastAPI, service: Service) -> None:
    """Add the routes of completions and chats."""

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Any:
        task = _language_model(service, body.model)
        prompts: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if isinstance(prompts[0], int):
            prompts = [prompts]
        service.worker.require_room(len(prompts) * body.n)

        def prepared() -> list[Choice]:
            return [
                choice
                for prompt in prompts
                for choice in _choices(task, task.prompt(prompt), body, body.max_tokens, USUAL_TOKENS)
            ]

        return await _answered(service, _Form.completion(body), await service.prepared(prepared), body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Any:
        task = _language_model(service, body.model)
        service.worker.require_room(body.n)
        wanted = body.max_completion_tokens or body.max_tokens

        def prepared() -> list[Choice]:
            messages = [
                {"role": message.role, "content": _text(message.content)}
                | ({"name": message.name} if message.name else {})
                for message in body.messages
            ]
            return _choices(task, task.chat(messages), body, wanted, task.max_tokens)

        return await _answered(service, _Form.chat(body), await service.prepared(prepared), body, request)


def _language_model(service: Service, name: str) -> CausalLM:
    task = service.task(name)
    if not isinstance(task, CausalLM):
        raise Refusal(f"task `{name}` is {task.kind}: use /v1/tasks/{name}/predict", param="model")
    return task


def _choices(task: CausalLM, prompt: list[int], body: Generation, max_tokens: int | None, usual: int) -> list[Choice]:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    options = {"temperature": body.temperature, "top_p": body.top_p, "stop": stop}
    return task.choices(prompt, body.n, max_tokens=max_tokens, usual=usual, **options)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(piece.text for piece in content)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """The form in which an answer is written."""

    model: str
    is_chat: bool
    id: str
    created: int

    @classmethod
    def completion(cls, body: Generation) -> "_Form":
        return cls(model=body.model, is_chat=False, id=f"cmpl-{uuid.uuid4().hex}", created=int(time.time()))

    @classmethod
    def chat(cls, body: Generation) -> "_Form":
        return cls(model=body.model, is_chat=True, id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()))

    def whole(self, choices: Sequence[Choice], n: int) -> dict[str, Any]:
        """Write whole answers. n: the number of choices per prompt."""
        written = [
            {"index": number, **self._content(choice.text), "logprobs": None, "finish_reason": choice.finish}
            for number, choice in enumerate(choices)
        ]
        return self._head("") | {"choices": written, "usage": _usage(choices, n)}

    def piece(self, number: int, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """Write a piece of a stream. text: None at the end of a choice."""
        if self.is_chat:
            content: dict[str, Any] = {"delta": {} if text is None else {"content": text}}
        else:
            content = {"text": text or ""}
        choice = {"index": number, **content, "logprobs": None, "finish_reason": finish}
        return self._head(".chunk") | {"choices": [choice]}

    def first(self, number: int) -> dict[str, Any]:
        """Write the first piece of a chat, which names the speaker."""
        found = self.piece(number, "")
        found["choices"][0]["delta"]["role"] = "assistant"
        return found

    def usage(self, choices: Sequence[Choice], n: int) -> dict[str, Any]:
        return self._head(".chunk") | {"choices": [], "usage": _usage(choices, n)}

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _usage(choices: Sequence[Choice], n: int) -> dict[str, int]:
    prompt, made = sum(len(choice.prompt) for choice in choices[::n]), sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


async def _answered(
    service: Service, form: _Form, choices: Sequence[Choice], body: Generation, request: Request
) -> Any:
    for number, choice in enumerate(choices if body.seed is not None else ()):
        assert body.seed is not None
        choice.seed = (body.seed + number) % (1 << 63)
    if not body.stream:
        return form.whole(await service.answers(form.model, choices, request.receive), body.n)
    pieces: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(number: int, text: str | None) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, (number, text))

    for number, choice in enumerate(choices):
        choice.on_text = lambda text, number=number: tell(number, text)  # type: ignore[misc]
    waited = service.submit(form.model, choices)
    for number, answer in enumerate(waited):
        answer.add_done_callback(lambda _answer, number=number: pieces.put_nowait((number, None)))  # type: ignore[misc]

    def end() -> None:
        for answer in waited:
            answer.cancel()
        service.cancel(form.model, choices)

    return _Stream(_events(service, form, choices, body, waited, pieces), end)


class _Stream(StreamingResponse):
    """A stream of events that ends its texts when it ends, since a client may leave before the first event."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _events(
    service: Service,
    form: _Form,
    choices: Sequence[Choice],
    body: Generation,
    waited: "Sequence[asyncio.Future[Any]]",
    pieces: "asyncio.Queue[tuple[int, str | None]]",
) -> AsyncIterator[str]:
    """Yield each piece as it comes."""
    try:
        if form.is_chat:
            for number in range(len(choices)):
                yield _event(form.first(number))
        ended = 0
        while ended < len(choices):
            number, text = await pieces.get()
            if text is not None:
                yield _event(form.piece(number, text))
                continue
            await service.outcome(form.model, waited[number])
            yield _event(form.piece(number, None, choices[number].finish))
            ended += 1
        if body.stream_options.include_usage:
            yield _event(form.usage(choices, body.n))
        yield "data: [DONE]\n\n"
    except Refusal as refusal:  # after a status of 200, only an event can report it
        yield _event(refusal.body)


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"
