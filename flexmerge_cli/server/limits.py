"""Checks bodies of requests: they must be JSON and within a size limit. An ASGI middleware; it knows no route."""

from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexmerge_cli.server.refusal import CLIENT_GONE, Refusal


class BoundedBodies:
    """Reads the body of each request up to the limit before the application sees it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._body(dict(scope["headers"]), receive)
        except Refusal as refusal:
            response = JSONResponse(refusal.body, refusal.status, headers={"Connection": "close"})
            await response(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replayed, send)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Read the body. Raises Refusal, also if the client disconnects first."""
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal("a body is JSON, sent with `Content-Type: application/json`", status=415)
        length = headers.get(b"content-length", b"0")
        too_long = Refusal(f"the body is longer than {self._max_bytes:,} bytes, the server's limit", status=413)
        if length.isdigit() and int(length[:20]) > self._max_bytes:
            raise too_long
        body = bytearray()
        while True:
            message: dict[str, Any] = dict(await receive())
            if message["type"] == "http.disconnect":
                raise Refusal("the client went away", status=CLIENT_GONE)
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise too_long
            if not message.get("more_body", False):
                return bytes(body)
