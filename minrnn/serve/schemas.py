"""What clients send and get: OpenAI's completions, with `top_k` and `session` beside them."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
# the first wrong element ends the check: a body may hold a million of them
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True, max_length=1000)]
Lists = Annotated[list[Ids], Field(fail_fast=True, max_length=1000)]


class _Body(BaseModel):
    # an unknown field is refused: a misspelt one would go unnoticed
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream of events has beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionBody(_Body):
    """A request for completions."""

    model: str
    prompt: str | Texts | Ids | Lists | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = 0
    n: Annotated[int, Field(ge=1)] | None = 1
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    user: str | None = None
    session: Name | None = None
    # taken only at the values that change nothing
    best_of: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    suffix: str | None = None


class ForkBody(_Body):
    """Under which name a session is copied."""

    name: Name


class Refused(Exception):
    """A request that is not served, with its HTTP status."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def error(
    message: str, code: str, kind: str = "invalid_request_error", param: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
