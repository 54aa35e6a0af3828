"""Defines the bodies of requests. Unknown keys, wrong types and numbers that are not finite are refused."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Token = Annotated[int, Field(ge=0)]
NotEmpty = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """The keys of a request. A key that is null counts as not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Keys of OpenAI's API that are not supported, each with values that have no effect, which some clients send."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: own for key, own in value.items() if own is not None and not _is_among(own, cls.neutral.get(key))}


def _is_among(value: Any, neutral: tuple[Any, ...] | None) -> bool:
    return any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in neutral or ())


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
    """The user who asks; it has no effect."""


class StreamOptions(Body):
    neutral = {"include_obfuscation": (False,)}
    include_usage: bool = False


class Generation(Body):
    """The keys that completions and chats have in common."""

    neutral = {
        "best_of": (1,), "echo": (False,), "frequency_penalty": (0,), "function_call": ("none", "auto"),
        "functions": ([],), "logit_bias": ({},), "logprobs": (False,), "modalities": (["text"],),
        "parallel_tool_calls": (True, False), "presence_penalty": (0,), "response_format": ({"type": "text"},),
        "store": (False,), "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,),
    }  # fmt: skip
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
    """The user who asks; like the next four, it has no effect on the answer."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    metadata: dict[str, str] | None = None


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
    neutral = {"annotations": ([],), "tool_calls": ([],)}
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None


class Chat(Generation):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
