"""The eight tools as native LangChain tools, with the same names, descriptions and parameters as over MCP.

    from rs_tools.langchain import RemoteSensingToolkit

    tools = RemoteSensingToolkit(roots=["/home/you/imagery"]).get_tools()

It needs langchain-core only (`pip install 'rs-perception[langchain]'`), no MCP session and no other process than the
model server. A tool's message holds the answer in words for the model; its artifact is the typed result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr, SecretStr

try:
    from langchain_core.tools import BaseTool, BaseToolkit, ToolException
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "rs_tools.langchain needs langchain-core: pip install 'rs-perception[langchain]'", name=error.name
    ) from error

from rs_tools import _client, _submit
from rs_tools.declarations import DECLARATIONS, Declaration
from rs_tools.errors import PerceptionError
from rs_tools.forking import OfProcess
from rs_tools.imagery.access import AccessPolicy
from rs_tools.results import Result
from rs_tools.summary import summarize
from rs_tools.tools import DEADLINE_S, Tools


class PerceptionTool(BaseTool):
    """One tool. Sync and async callers, from any thread or event loop, share one client of the model server; processes
    forked from theirs may go on with it.

    A refusal (`PerceptionError`, or arguments that do not fit) becomes a message with status "error" whose text says
    what was wrong, what is allowed and what to try. Where `handle_tool_error` is set to False it is raised instead, as
    `ToolException` with the `PerceptionError` as its cause.
    """

    ask: Callable[..., Coroutine[Any, Any, Result]] = Field(exclude=True, repr=False)
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"

    def _run(self, **arguments: Any) -> tuple[str, Result]:
        answer = _submit(self._answer(arguments))
        try:
            return answer.result()
        finally:
            answer.cancel()  # of one that the caller interrupted; nothing happens to one that is done

    async def _arun(self, **arguments: Any) -> tuple[str, Result]:
        return await asyncio.wrap_future(_submit(self._answer(arguments)))

    async def _answer(self, arguments: dict[str, Any]) -> tuple[str, Result]:
        try:
            result = await self.ask(**arguments)
        except PerceptionError as error:
            raise ToolException(str(error)) from error
        return "\n".join([summarize(result), *(f"{file.kind}: {file.path}" for file in result.artifacts)]), result


class RemoteSensingToolkit(BaseToolkit):
    """The eight tools over some folders of images.

    Raises:
        AccessError: a root is not an existing folder, or a host is not a plain host name.
        InputError: `server` is no address, or `token` cannot be sent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    roots: Sequence[str | Path] = Field(min_length=1, description="folders whose images may be read; nothing else is")
    hosts: Sequence[str] = Field(default=(), description="hosts whose https addresses may be read, HOST or HOST:PORT")
    server: str | None = Field(default=None, description="URL of a model server; None finds or starts the local one")
    token: SecretStr | None = Field(default=None, description="bearer token of `server`")
    artifacts: str | Path | None = Field(
        default=None, description="folder of its own for masks, outlines and previews; None is one in the user's cache"
    )
    deadline_s: float = Field(default=DEADLINE_S, gt=0, description="seconds for one call")

    _tools: OfProcess[Tools] = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        def tools() -> Tools:
            client = _client(self.server, self.token.get_secret_value() if self.token else None)
            return Tools(AccessPolicy(self.roots, self.hosts), client, self.deadline_s, self.artifacts)

        self._tools = OfProcess(tools)

    def get_tools(self) -> list[BaseTool]:
        """The tools, in the order in which MCP lists them; they share opened images and connections."""
        return [_tool(declaration, self._tools) for declaration in DECLARATIONS]


def _tool(declaration: Declaration, tools: OfProcess[Tools]) -> PerceptionTool:
    async def ask(**arguments: Any) -> Result:
        return await getattr(tools.get(), declaration.name)(**arguments)

    def refusal(error: Any) -> str:
        return declaration.refusal(error.errors())

    return PerceptionTool(
        name=declaration.name,
        description=declaration.description,
        args_schema=declaration.arguments,
        ask=ask,
        handle_tool_error=True,
        handle_validation_error=refusal,
    )
