"""`make conformance`: the official conformance suite and inspector of MCP against real processes.

    product     the suite on `rs-mcp --http` itself; what needs a fixture is listed in baseline-REVISION.yml
    fixtures    the suite on the same server with the fixtures added: all must pass (tasks are an extension, not scored)
    inspector   tools/list with the inspector's schema lint, over stdio and HTTP, in both eras of the protocol
    load        500 calls of a tool, 8 at a time, in both eras, on a tiny model
    interop     other clients: the TypeScript SDK's, langchain-mcp-adapters and langchain[mcp], the latter two in
                environments of their own, which are made under conformance/; only where it is named

They need npm, and Node.js 22, which npm gets (conformance/package.json).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
IMAGES = ROOT / "examples" / "data"
SCENE = "itaipu_landsat8.tif"
REVISIONS = ("2026-07-28", "2025-11-25")
ERAS = ("modern", "legacy")
CALLS, AT_ONCE = 500, 8
STARTED_S = 300
LEGS = ("product", "fixtures", "inspector", "load")
TOKEN = "token-of-the-interoperation-run"
# langchain-mcp-adapters wants another version of the SDK than the project.
ENVIRONMENTS = {"langchain_adapters": "langchain-mcp-adapters==0.3.2", "langchain_mcp": "langchain[mcp]==1.4.7"}


class Unavailable(Exception):
    """What the suite itself needs is not here."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("legs", nargs="*", metavar="LEG", help=f"{', '.join(LEGS)} (default: all four), interop")
    parser.add_argument("--or-skip", action="store_true", help="pass, saying so, where npm or packages are missing")
    options = parser.parse_args()
    runs = {"product": product, "fixtures": fixtures, "inspector": inspector, "load": load, "interop": interop}
    if unknown := set(options.legs) - runs.keys():
        parser.error(f"no such leg: {', '.join(unknown)}; there are {', '.join(runs)}")
    try:
        node = install()
    except Unavailable as error:
        print(f"conformance: skipped, {error}", file=sys.stderr)
        return 0 if options.or_skip else 1
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for leg in options.legs or LEGS:
            for name, passed in runs[leg](node, Path(scratch)):
                print(f"conformance: {leg}, {name}: {'passed' if passed else 'FAILED'}", flush=True)
                failed += not passed
    return 1 if failed else 0


def install() -> Path:
    """Install what package-lock.json names, once, and tell where Node.js is.

    Raises:
        Unavailable: npm is not here, or it cannot get the packages.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed")
    lock, stamp = HERE / "package-lock.json", HERE / "node_modules" / ".installed"
    if not stamp.exists() or stamp.read_text() != lock.read_text():
        command = [npm, "ci", "--no-audit", "--no-fund", "--loglevel", "error"]
        try:
            ended = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired as error:
            raise Unavailable("npm did not get the packages within 10 minutes") from error
        if ended.returncode:
            raise Unavailable(f"npm cannot get the packages: {ended.stderr.strip()[-500:]}")
        shutil.copyfile(lock, stamp)
    node = HERE / "node_modules" / ".bin" / "node"
    version = subprocess.run([node, "--version"], capture_output=True, text=True)
    if version.returncode or int(version.stdout.lstrip("v").partition(".")[0]) < 22:
        raise Unavailable(f"Node.js 22 is needed, not {version.stdout.strip() or version.stderr.strip()[-200:]}")
    return node


def product(node: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    with rs_mcp(scratch) as url:
        for revision in REVISIONS:
            baseline = ["--expected-failures", str(HERE / f"baseline-{revision}.yml")]
            passed, _ = suite(node, scratch, url, revision, *baseline)
            yield revision, passed


def fixtures(node: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    port = free_port()
    with running([str(HERE / "serve_fixtures.py"), str(port)], port, scratch):
        for revision in REVISIONS:
            passed, summary = suite(node, scratch, f"http://127.0.0.1:{port}/mcp", revision)
            failing = [line for line in summary.splitlines() if "✗" in line]  # those that are not scored, too
            yield revision, passed and all("✗ tasks-" in line for line in failing)


def suite(node: Path, scratch: Path, url: str, revision: str, *options: str) -> tuple[bool, str]:
    """Whether the suite passed, and its summary."""
    script = HERE / "node_modules/@modelcontextprotocol/conformance/dist/index.js"
    results = ["--output-dir", str(scratch / "results")]
    command = [node, script, "server", "--url", url, "--requirements", revision, *results, "--timeout", "120000"]
    ended = subprocess.run([*command, *options], capture_output=True, text=True)
    summary = ended.stdout.rpartition("=== SUMMARY ===")[2]
    print(summary.strip() if ended.returncode == 0 else ended.stdout[-20_000:] + ended.stderr, flush=True)
    return ended.returncode == 0, summary


def inspector(node: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    stdio = ["--cwd", str(ROOT), sys.executable, "-m", "mcp_server", "--root", str(IMAGES)]
    with rs_mcp(scratch) as url:
        for transport, target in (("stdio", stdio), ("HTTP", ["--server-url", url, "--transport", "http"])):
            for era in ERAS:
                ended = inspect(node, scratch, "--method", "tools/list", "--strict", "--protocol-era", era, *target)
                lines = ended.stderr.strip().splitlines()
                print(lines[-1] if lines and ended.returncode == 0 else "no remarks" if not lines else ended.stderr)
                yield f"tools/list over {transport}, {era} era", ended.returncode == 0


def load(node: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    call = ["--method", "tools/call", "--tool-name", "classify", "--tool-arg", f"image={SCENE}"]
    call += ["--load", "--load-requests", str(CALLS), "--load-concurrency", str(AT_ONCE), "--format", "json"]
    with debug_model(scratch) as model, rs_mcp(scratch, *model) as url:
        for era in ERAS:
            target = ["--protocol-era", era, "--server-url", url, "--transport", "http"]
            ended = inspect(node, scratch, *call, *target)
            print(ended.stdout.strip() or ended.stderr.strip()[-2000:], flush=True)
            yield f"{CALLS} calls, {AT_ONCE} at a time, {era} era", ended.returncode == 0 and all_ok(ended.stdout)


def all_ok(report: str) -> bool:
    """Whether every call of a load run ended with a result: the inspector does not fail on errors of tools."""
    return json.loads(report)["result"]["ok"] == CALLS


def interop(node: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    tokens = scratch / "tokens"
    tokens.write_text(f"interop {TOKEN}\n")
    with debug_model(scratch) as model, rs_mcp(scratch, *model, "--tokens", str(tokens)) as url:
        server = [url, TOKEN, sys.executable, "-m", "mcp_server", "--root", str(IMAGES), *model]
        clients: dict[str, list[Path]] = {"typescript": [node, HERE / "interop" / "typescript.mjs"]}
        for name, requirement in ENVIRONMENTS.items():
            clients[name] = [environment(name, requirement), HERE / "interop" / f"{name}.py"]
        for name, client in clients.items():
            variables = os.environ | {"PYTHONPATH": str(ROOT), "RS_PERCEPTION_STATE": str(scratch / "state")}
            ended = subprocess.run([*client, *server], capture_output=True, text=True, env=variables, cwd=scratch)
            print(ended.stdout.strip() if ended.returncode == 0 else ended.stdout + ended.stderr[-4000:], flush=True)
            yield name, ended.returncode == 0


def environment(name: str, requirement: str) -> Path:
    """The Python of an environment with `requirement`, made where it is not yet there."""
    folder = HERE / ".environments" / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement], check=True)
    return python


def inspect(node: Path, scratch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = HERE / "node_modules/@modelcontextprotocol/inspector/clients/launcher/build/index.js"
    command = [node, script, "--cli", "--connect-timeout", "120000", *options]
    environment = os.environ | {"HOME": str(scratch), "RS_PERCEPTION_STATE": str(scratch / "state")}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@contextmanager
def rs_mcp(scratch: Path, *options: str) -> Iterator[str]:
    """The address of a running `rs-mcp --http`."""
    port = free_port()
    command = ["-m", "mcp_server", "--root", str(IMAGES), "--http", "--port", str(port), "--rate-limit", "100000"]
    with running([*command, *options], port, scratch):
        yield f"http://127.0.0.1:{port}/mcp"


@contextmanager
def debug_model(scratch: Path) -> Iterator[list[str]]:
    """The options that name a running model server with a tiny model."""
    weights, token, port = scratch / "weights", scratch / "token", free_port()
    write = "import pathlib, sys; from model_server.checkpoints.debug import write_debug_checkpoint; "
    write += "write_debug_checkpoint(pathlib.Path(sys.argv[1]), dense=True)"
    subprocess.run([sys.executable, "-c", write, str(weights)], cwd=ROOT, check=True)
    token.write_text("token-of-the-load-run\n")
    command = ["-m", "model_server.app", "--port", str(port), "--weights", str(weights), "--threads", "1"]
    url = f"http://127.0.0.1:{port}"
    with running([*command, "--token-file", str(token)], port, scratch):
        deadline = time.monotonic() + STARTED_S
        while not ready(url):
            assert time.monotonic() < deadline, "the model does not load"
            time.sleep(0.1)
        yield ["--model-url", url, "--token-file", str(token)]


@contextmanager
def running(arguments: Sequence[str], port: int, scratch: Path) -> Iterator[None]:
    """A Python process that accepts connections at a port; its log is shown where it fails to start."""
    log = scratch / f"{port}.log"
    environment = os.environ | {"RS_PERCEPTION_STATE": str(scratch / "state"), "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + STARTED_S
        while not accepts(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(arguments)} did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def ready(url: str) -> bool:
    """Whether a model server has loaded its model."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/ready", timeout=60):
            return True
    except urllib.error.HTTPError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    sys.exit(main())
