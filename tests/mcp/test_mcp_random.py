"""Whatever arguments a client sends, a tool gives a valid answer or an error that helps, and never breaks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcp import Client
from mcp.types import CallToolResult
from mcp_models import PlantedModel
from mcp_processes import text_of

import mcp_server
from rs_tools.declarations import DECLARATIONS, Declaration
from rs_tools.imagery.access import AccessPolicy
from rs_tools.mcp.schemas import published

EXAMPLES = int(os.environ.get("RS_EXAMPLES", "60"))  # argument sets for each tool; 1000 take minutes

Call = Callable[[str, dict[str, Any]], CallToolResult]

READABLE = ["scene.tif", "later.tif", "elsewhere.tif", "empty.tif", "plain.png", "radar.tif"]
PATHS = [
    "notes.tif", "truncated.tif", "", " ", ".", "..", "/", "/etc/passwd", "scene.tif\0", "SCENE.TIF", "a" * 5000,
    "rs-artifact://x.tif", "https://", "file:///etc/passwd", "\ud800",
]  # fmt: skip
USUAL = {
    "image": READABLE, "before": READABLE, "after": READABLE, "folder": ["", "."], "detail": ["short", "full"],
    "query": ["ship", "the largest ship"], "max_objects": [1, 5, 1000], "min_score": [0, 0.5, 1], "top_k": [1, 200],
    "question": ["Is there a ship?", "How many ships are there?", "How much water is there?"],
    "embeddings": ["", "", "", ".", "scene.tif"],
}  # fmt: skip
NUMBERS = st.one_of(st.integers(-5, 70), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
WORDS = st.sampled_from(["water", "forest", "road"])
ANYTHING = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=20), st.lists(NUMBERS, max_size=5),
    st.dictionaries(st.text(max_size=5), st.none(), max_size=2),
)  # fmt: skip


def values(name: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Mostly what a parameter is meant for, at times whatever its type allows, at times anything."""
    odd: st.SearchStrategy[Any] = NUMBERS
    match schema["type"], schema.get("items", {}).get("type"):
        case "string", _:
            usual, odd = st.sampled_from(USUAL[name]), st.one_of(st.sampled_from(PATHS), st.text(max_size=40))
        case "array", "string":
            usual = st.lists(WORDS, min_size=2, max_size=4, unique=True)
            odd = st.lists(st.text(max_size=10), max_size=300)
        case "array", "number":
            corners = st.integers(0, 31), st.integers(0, 23), st.integers(32, 64), st.integers(24, 48)
            usual, odd = st.one_of(st.just([]), st.tuples(*corners).map(list)), st.lists(NUMBERS, max_size=5)
        case "array", _:
            usual, odd = st.sampled_from([[], [1], [3, 2, 1]]), st.lists(NUMBERS, max_size=5)
        case "boolean", _:
            usual = odd = st.booleans()
        case _:
            usual = st.sampled_from(USUAL[name])
    return st.integers(0, 11).flatmap(lambda n: {0: ANYTHING, 1: odd}.get(n, usual))


def arguments(declaration: Declaration) -> st.SearchStrategy[dict[str, Any]]:
    schema = declaration.input_schema
    known = {name: values(name, one) for name, one in schema["properties"].items()}
    required = {name: known[name] for name in schema.get("required", ())}
    optional = {name: known[name] for name in known.keys() - required.keys()}
    whole = st.fixed_dictionaries(required, optional=optional)
    parts = st.fixed_dictionaries({}, optional={**known, "bbox": ANYTHING})
    return st.integers(0, 7).flatmap(lambda n: whole if n else parts)


@pytest.fixture(scope="module")
def call(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """Calls a tool of one server over one session, from this thread."""
    policy, artifacts = AccessPolicy([small]), str(tmp_path_factory.mktemp("artifacts"))
    with pytest.MonkeyPatch.context() as patch, start_blocking_portal() as portal:
        patch.setattr(mcp_server, "ModelClient", lambda *_: PlantedModel())
        patch.setattr(logging.getLogger("mcp"), "level", logging.WARNING)  # a line for each refusal takes longest
        client = Client(mcp_server.build_server(policy, artifacts=artifacts))
        with portal.wrap_async_context_manager(client) as session:
            yield lambda tool, given: portal.call(session.call_tool, tool, given)


@pytest.mark.parametrize("declaration", DECLARATIONS, ids=lambda one: one.name)
def test_random_arguments_give_a_valid_answer_or_an_error_that_helps(call: Call, declaration: Declaration) -> None:
    published_schema = jsonschema.Draft202012Validator(published(declaration))
    answered = refused = 0

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(arguments(declaration))
    def check(sent: dict[str, Any]) -> None:
        nonlocal answered, refused
        result = call(declaration.name, sent)
        text = text_of(result)
        assert 0 < len(text) < 5000
        if result.is_error:
            refused += 1
            assert result.structured_content is None
            assert len(text.split()) > 4
            assert not text.startswith("Error executing tool"), text
        else:
            answered += 1
            published_schema.validate(result.structured_content)

    check()
    assert answered > EXAMPLES / 20
    assert refused > EXAMPLES / 20
