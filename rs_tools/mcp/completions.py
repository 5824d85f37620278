"""Completions of prompt arguments: images that may be read, and classes that the model knows."""

from __future__ import annotations

import asyncio
from itertools import islice

from mcp.server import MCPServer
from mcp.types import (
    Completion,
    CompletionArgument,
    CompletionContext,
    PromptReference,
    ResourceTemplateReference,
)

from rs_tools.errors import ServerUnavailable
from rs_tools.imagery.access import AccessPolicy, in_unicode
from rs_tools.mcp.prompts import CLASS_ARGUMENTS, IMAGE_ARGUMENTS
from rs_tools.model_facts import ModelFacts
from rs_tools.tools import Tools

MAX_VALUES = 100  # more are not allowed by the protocol
MAX_SEARCHED = 5000  # files


def add_completions(server: MCPServer[Tools], policy: AccessPolicy, facts: ModelFacts) -> None:
    """Complete the arguments of the prompts; nothing else has any."""

    @server.completion()
    async def complete(
        ref: PromptReference | ResourceTemplateReference,
        argument: CompletionArgument,
        context: CompletionContext | None,
    ) -> Completion | None:
        if not isinstance(ref, PromptReference):
            return None
        if argument.name in IMAGE_ARGUMENTS:
            return _completion(await asyncio.to_thread(_images, policy, argument.value))
        if argument.name in CLASS_ARGUMENTS:
            return _completion(await _classes(facts, argument.value))
        return None


def _images(policy: AccessPolicy, typed: str) -> list[str]:
    """Paths that begin with what was typed, or whose file name has it somewhere."""
    paths = (str(path) for path in islice(policy.images(), MAX_SEARCHED) if in_unicode(path))
    return [path for path in paths if path.startswith(typed) or typed.lower() in path.rpartition("/")[2].lower()]


async def _classes(facts: ModelFacts, typed: str) -> list[str]:
    try:
        taxonomy = await facts.taxonomy()
    except ServerUnavailable:  # a completion is a convenience; the call itself will say what is wrong
        return []
    return [name for name in [*taxonomy.things, *taxonomy.covers, *taxonomy.scenes] if name.startswith(typed.lower())]


def _completion(values: list[str]) -> Completion:
    values = list(dict.fromkeys(values))
    return Completion(values=values[:MAX_VALUES], total=len(values), has_more=len(values) > MAX_VALUES)
