"""Defines the answer to a request that is refused: a status, and an error in the form of OpenAI's API."""

from typing import Any

CLIENT_GONE = 499
"""The status, used only in the metrics, of a request whose client did not wait for the answer."""


class Refusal(Exception):
    """A request that is refused."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        """message: what is wrong, and where. status: the HTTP status. param: the request's key that caused it. code: a
        word for programs."""
        super().__init__(message)
        self.message, self.status, self.param, self.code = _sendable(message), status, _sendable(param), code

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"} if self.status == 503 else {}

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _sendable(text: Any) -> Any:
    """Replace halves of surrogate pairs, which JSON may contain and UTF-8 may not."""
    return text.encode(errors="replace").decode() if isinstance(text, str) else text
