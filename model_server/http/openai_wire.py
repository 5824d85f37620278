"""What the OpenAI-compatible calls have in common: reading a body, naming the model, refusing."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError


class CallError(ValueError):
    """A call that cannot be answered as it is; `param` is the field that is wrong."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(LookupError):
    """The call names a model that is not loaded."""

    def __init__(self, asked: str, loaded: str) -> None:
        super().__init__(f"the model {asked[:80]!r} is not loaded here, {loaded!r} is: see GET /v1/models")


MAX_VALUES = 100_000  # of a body: parsed, small values take thirty times their bytes; pictures in base64 are one each

_M = TypeVar("_M", bound=BaseModel)


def read_body(kind: type[_M], body: bytes) -> _M:
    """The JSON of a body. Raises CallError, which names the first field that is wrong and never quotes its value:
    that may be an image of megabytes."""
    if body.count(b",") > MAX_VALUES:
        raise CallError(f"the body has more than {MAX_VALUES} values: send a shorter conversation or list")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise CallError(*first_fault(error)) from None


def first_fault(error: ValidationError) -> tuple[str, str | None]:
    """What is wrong with which field."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return (f"{where}: {fault['msg']}" if where else fault["msg"]), where or None


def check_model(asked: str, loaded: str) -> None:
    """Raises UnknownModel."""
    if asked != loaded:
        raise UnknownModel(asked, loaded)
