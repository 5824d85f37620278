"""What can be read over MCP beside answers: the files that answers link to, the classes of the model, and its card."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mcp.server import MCPServer
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError

from rs_tools.errors import ArtifactError, ServerUnavailable
from rs_tools.model_facts import ModelFacts
from rs_tools.results import MIME_TYPES, SCHEME, Artifact
from rs_tools.serving.tokens import current_caller
from rs_tools.tools import Tools

TAXONOMY = "rs-perception://taxonomy"
MODEL_CARD = "rs-perception://model-card"
MAX_FILES = 200  # of one caller that are listed, the newest
MAX_CALLERS = 1000

ResourceContext = Context[Tools, Any]


def add_resources(server: MCPServer[Tools], facts: ModelFacts) -> None:
    """Make files, classes and card readable."""
    for suffix, mime_type in MIME_TYPES.items():
        server.resource(
            f"{SCHEME}://{{name}}{suffix}",
            name=f"artifact{suffix}",
            title=f"File of an answer ({suffix[1:]})",
            description="A file that an answer links to",
            mime_type=mime_type,
        )(_reader(suffix, mime_type))

    @server.resource(
        TAXONOMY,
        name="taxonomy",
        title="Classes of the model",
        description="The words that the model was taught: scenes for classify, things for ground, covers for segment. "
        "Other words may be used; answers warn where they are not understood.",
        mime_type="application/json",
    )
    async def taxonomy() -> str:
        try:
            return (await facts.taxonomy()).model_dump_json(indent=1)
        except ServerUnavailable as error:
            raise ResourceError(str(error)) from error

    @server.resource(
        MODEL_CARD,
        name="model-card",
        title="Model card",
        description="What the model is, what it is meant for and not meant for, its training data and how well it does",
        mime_type="text/markdown",
    )
    async def model_card() -> str:
        try:
            return await facts.card()
        except ServerUnavailable as error:
            raise ResourceError(str(error)) from error


def _reader(suffix: str, mime_type: str) -> Callable[[str, ResourceContext], Awaitable[str | bytes]]:
    """Reads artifacts of one kind; a file of text as text."""

    async def read(name: str, ctx: ResourceContext) -> str | bytes:
        try:
            content = await ctx.request_context.lifespan_context.read_artifact(f"{SCHEME}://{name}{suffix}")
        except ArtifactError as error:
            raise ResourceNotFoundError(str(error)) from error
        return content.decode() if mime_type.endswith("json") else content

    return read


class AnsweredFiles:
    """Lists to each caller, among the resources, the files of the answers that this server gave to that caller.

    Middleware. The names of files are their keys, so no caller is told of those that another one's answers have.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, OrderedDict[str, Artifact]] = OrderedDict()

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        result = await call_next(ctx)
        if isinstance(result, dict):
            if ctx.method == "tools/call":
                self._note((result.get("structuredContent") or {}).get("artifacts", ()))
            if ctx.method == "resources/list":
                result["resources"] += [_listed(file) for file in self._present()]
        return result

    def _note(self, files: Any) -> None:
        if not files:
            return
        kept = self._of.setdefault(current_caller(), OrderedDict())
        self._of.move_to_end(current_caller())
        kept |= {file["uri"]: Artifact.model_validate(file) for file in files}
        while len(kept) > MAX_FILES:
            kept.popitem(last=False)
        while len(self._of) > MAX_CALLERS:
            self._of.popitem(last=False)

    def _present(self) -> list[Artifact]:
        """The caller's files that are still there, the newest first."""
        return [file for file in reversed(self._of.get(current_caller(), {}).values()) if Path(file.path).is_file()]


def _listed(file: Artifact) -> dict[str, Any]:
    return {"uri": file.uri, "name": file.name, "title": f"{file.kind} of an answer", "mimeType": file.mime_type}
