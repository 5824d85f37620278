"""`rs-tools` as a person or a script uses it: a real process, its output and its exit status."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rs_tools.cli import app

SCENES = Path(__file__).parents[2] / "examples" / "data"
SCENE = SCENES / "itaipu_landsat8.tif"
COMMANDS = ["inspect", "list", "caption", "vqa", "classify", "ground", "segment", "detect-change", "serve"]
COMMANDS += ["doctor", "demo"]


def rs_tools(*arguments: str | Path, state: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    if state is not None:
        environment["RS_PERCEPTION_STATE"] = str(state)
    command = [sys.executable, "-m", "rs_tools.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_inspect_prints_the_facts_for_people() -> None:
    done = rs_tools("inspect", SCENE)
    assert done.returncode == 0, done.stderr
    for fact in ("560 x 560", "uint16", "EPSG:32621", "-54.", "30"):
        assert fact in done.stdout


def test_json_output_is_the_whole_result_and_nothing_else() -> None:
    done = rs_tools("inspect", SCENE, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["epsg"] == 32621
    assert facts["provenance"]["image_digest"]


def test_list_shows_the_images_of_a_folder() -> None:
    done = rs_tools("list", SCENES)
    assert done.returncode == 0, done.stderr
    for scene in SCENES.glob("*.tif"):
        assert scene.name in done.stdout


def test_a_file_named_in_another_encoding_is_answered_in_json_that_leads_back_to_it(tmp_path: Path) -> None:
    named = tmp_path / os.fsdecode(b"caf\xe9.tif")
    named.write_bytes(SCENE.read_bytes())
    done = rs_tools("inspect", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert Path(line["image"]) == named
    assert line["answer"]["width"] == 560


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "no_such.tif"], "no_such.tif"),
        (["inspect", __file__], "not a raster"),
        (["caption", SCENE, "--region", "600", "0", "700", "100"], "560"),
        (["vqa", SCENE, " "], "question"),
        (["ground", SCENE, " "], "query"),
        (["classify", SCENE, "--embeddings", SCENE], "64 bands"),
        (["segment", SCENE, "--class", " "], "characters"),
        (["detect-change", SCENE, SCENES / "yellowstone_road.jpg"], "place on Earth"),
    ],
)
def test_a_refused_image_or_question_gives_status_1_and_the_reason_on_stderr(
    arguments: list[str | Path], said: str
) -> None:
    done = rs_tools(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["list", "no_such_folder"],
        ["classify", SCENE, "--top-k", "many"],
        ["segment", SCENE],
        ["caption", SCENE, "--model-url", "http://host:port"],
    ],
)
def test_wrong_usage_gives_status_2(arguments: list[str | Path]) -> None:
    assert rs_tools(*arguments).returncode == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_explained_with_an_example(command: str) -> None:
    ask = partial(CliRunner().invoke, app, env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert command in ask(["--help"]).output
    if command != "serve":  # its options are those of rs-model-server
        assert f"Example: rs-tools {command}" in ask([command, "--help"]).output


def test_the_model_server_runs_in_the_foreground_with_the_options_it_is_given() -> None:
    done = rs_tools("serve", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "--token-file" in done.stderr


def test_nothing_is_drawn_where_no_terminal_is_and_the_answers_come_as_plain_lines() -> None:
    done = rs_tools("inspect", SCENE, SCENES / "raleigh_landsat7.tif", "--json")
    assert done.stderr == ""
    assert [json.loads(line)["answer"]["epsg"] for line in done.stdout.splitlines()] == [32621, None]


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_on_a_terminal_a_bar_says_which_image_is_looked_at_and_stdout_holds_the_answers_alone() -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "rs_tools.cli", "inspect", str(SCENE), str(SCENE.parent), "--json"]
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=environment | {"TERM": "xterm", "COLUMNS": "200"}
    )
    os.close(theirs)
    assert process.stdout is not None
    drawn = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side was closed
            break
        if not part:
            break
        drawn += part
    lines = process.stdout.read().decode().splitlines()
    assert process.wait() == 0
    assert len([json.loads(line) for line in lines]) == 4
    assert b"2/4" in drawn


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_an_interrupted_question_gives_status_130_at_once_and_without_a_traceback() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "rs_tools.cli", "caption", str(SCENE), "--model-url", url]
        environment = os.environ | {"NO_PROXY": "127.0.0.1"}
        heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heard)
        silent.settimeout(120)
        asked, _ = silent.accept()  # it waits for an answer that does not come
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        asked.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_the_demonstration_prints_commands_with_their_answers(own_state: Path) -> None:
    done = rs_tools("demo", SCENES / "ordway_swisher_neon.tif", state=own_state)  # one look is all of it
    assert done.returncode == 0, done.stderr
    for command in ("inspect", "caption", "classify", "vqa", "ground", "segment"):
        assert f"$ rs-tools {command}" in done.stdout
    assert "400 x 400" in done.stdout
    assert "confidence" in done.stdout


def test_a_question_asked_at_the_terminal_is_answered_by_a_model_server_that_it_starts(own_state: Path) -> None:
    done = rs_tools("classify", SCENE, "--label", "lake", "--label", "car park", "--json", state=own_state)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert {one["label"] for one in answer["top"]} == {"lake", "car park"}
    again = rs_tools("caption", SCENE, "--region", "0", "0", "256", "256", state=own_state)
    assert again.returncode == 0, again.stderr
    assert "confidence" in again.stdout
