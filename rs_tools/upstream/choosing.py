"""Whether our own wire or another model's endpoint answers, from the options that both commands take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rs_tools.endpoint import base_url, bearer
from rs_tools.errors import InputError

if TYPE_CHECKING:  # asked for by few, and the tools must start fast
    from rs_tools.upstream.client import UpstreamClient

PROFILE_NAMES = ("rsunivlm", "geochat", "qwen-vl", "generic")
DEFAULT_PROFILE = "generic"
KEY_VARIABLE = "RS_MODEL_API_KEY"
MODEL_HELP = (
    f"Name of another model at --model-url, an OpenAI-compatible vision endpoint (key: environment {KEY_VARIABLE})."
)
PROFILE_HELP = f"How --model is asked and read: {', '.join(PROFILE_NAMES)} (default {DEFAULT_PROFILE})."


@dataclass(frozen=True)
class Upstream:
    """Another model at an OpenAI-compatible endpoint."""

    url: str
    model: str
    profile: str

    def open(self) -> UpstreamClient:
        """A client with the key from the environment, or none where none is set."""
        from rs_tools.upstream.client import UpstreamClient
        from rs_tools.upstream.profiles import PROFILES

        return UpstreamClient(self.url, self.model, PROFILES[self.profile], key())


def key() -> str | None:
    """The endpoint's key from the environment."""
    return os.environ.get(KEY_VARIABLE)


def chosen(model_url: str | None, model: str | None, profile: str | None, token_file: object = None) -> Upstream | None:
    """None: our own wire.

    Raises:
        InputError: options that do not go together, no address, or a key that cannot be sent.
    """
    if model is None:
        if profile is not None:
            raise InputError("--profile is for --model, which is not given")
        return None
    if model_url is None:
        raise InputError("--model is for --model-url, the address of the endpoint, which is not given")
    if token_file is not None:
        raise InputError(f"--token-file is for an rs-model-server; put the endpoint's key into {KEY_VARIABLE}")
    name = profile or DEFAULT_PROFILE
    if name not in PROFILE_NAMES:
        raise InputError(f"--profile must be one of {', '.join(PROFILE_NAMES)}, not {name!r}")
    base_url(model_url)
    try:
        bearer(key())
    except InputError as error:
        raise InputError(f"{KEY_VARIABLE}: {error}") from error
    return Upstream(model_url, model, name)
