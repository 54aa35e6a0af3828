"""Defines the bodies of requests. Unknown keys, wrong types and numbers that are not finite are refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NEUTRAL: dict[str, Any] = {
    "best_of": 1, "echo": False, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False, "presence_penalty": 0,
    "parallel_tool_calls": True, "response_format": {"type": "text"}, "store": False, "suffix": "", "tools": [],
}  # fmt: skip
"""Keys of OpenAI's API that are not supported, each with the value that has no effect, which some clients send."""

Positive = Annotated[int, Field(ge=1)]
Token = Annotated[int, Field(ge=0)]
NotEmpty = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """The keys of a request. A key that is null counts as not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: own for key, own in value.items() if own is not None} if isinstance(value, dict) else value


class Predict(Body):
    """The body of `/v1/tasks/NAME/predict`."""

    inputs: Annotated[list[Any], Field(min_length=1)]
    max_tokens: Positive | None = None


class Embedded(Body):
    """The body of `/v1/embeddings`."""

    model: str
    input: NotEmpty | Annotated[list[str], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    """The user that asks; it has no effect."""


class StreamOptions(Body):
    include_usage: bool = False


class Generation(Body):
    """The keys that completions and chats have in common."""

    model: str
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: NotEmpty | Annotated[list[NotEmpty], Field(max_length=4)] = []
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    """The user who asks; it has no effect."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: own for key, own in value.items() if key not in NEUTRAL or not _is_same(own, NEUTRAL[key])}


def _is_same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


class Completion(Generation):
    """The body of `/v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )


class ContentPart(Body):
    """A part of a message's content; only text is accepted."""

    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None


class Chat(Generation):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
