"""Python, packages, extras, commands, and what the server's process says when it starts."""

from __future__ import annotations

import importlib.metadata
import operator
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rs_tools.doctor.findings import Finding, Setup, run_python

PROJECT = "rs-perception"
COMMANDS = ("rs-mcp", "rs-tools", "rs-model-server")
REINSTALL = f"{sys.executable} -m pip install --upgrade {PROJECT} (in a checkout: pip install -e .)"
SLOW_START_S = 20.0  # clients give a server half a minute to a minute
# What an extra is for, where its absence is worth a word.
EXTRAS = {
    "server": "a model server on this machine",
    "langchain": "the LangChain tools",
    "geo": "GeoDataFrames and GeoParquet",
}
_COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}


def python(setup: Setup) -> Iterator[Finding]:
    """The interpreter, and the platform it runs on."""
    what = f"Python {platform.python_version()} at {sys.executable} on {platform.system()} {platform.machine()}"
    if sys.platform == "win32" and setup.model_url is None:
        yield Finding(
            "python",
            "warning",
            f"{what}; a local model server is started by itself on Linux and macOS only",
            "run rs-model-server, and give rs-mcp --model-url http://127.0.0.1:8765",
        )
    else:
        yield Finding("python", "ok", what)


@dataclass(frozen=True)
class _Requirement:
    name: str
    bounds: str  # such as >=2.3,<3
    extra: str  # empty: of the core

    def shortfall(self) -> str:
        """What is wrong with what is installed; empty where nothing is."""
        try:
            version = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.name} is missing"
        for sign, bound in re.findall(r"(>=|<=|==|>|<)\s*([\w.]+)", self.bounds):
            if not _COMPARE[sign](_release(version), _release(bound)):
                return f"{self.name} {version} is not {self.bounds}"
        return ""


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version: 2.13.0+cpu -> (2, 13). Zeros at the end do not count."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def _requirements() -> list[_Requirement]:
    """What the installed project asks for. Raises PackageNotFoundError: it is not installed."""
    found = []
    for line in importlib.metadata.requires(PROJECT) or []:
        wanted, _, marker = line.partition(";")
        wanted = re.sub(r"\[.*?]", "", wanted.strip())  # pyjwt[crypto]>=2.10
        name = re.split(r"[^\w.-]", wanted, maxsplit=1)[0]
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)", marker)
        if name != PROJECT:
            found.append(_Requirement(name, wanted.removeprefix(name).strip("() "), extra[1] if extra else ""))
    return found


def packages(setup: Setup) -> Iterator[Finding]:
    """The project itself and the packages of its core."""
    try:
        core = [one for one in _requirements() if not one.extra]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "problem", f"{PROJECT} is not installed for {sys.executable}", REINSTALL)
        return
    wrong = [said for one in core if (said := one.shortfall())]
    if wrong:
        yield Finding("packages", "problem", "; ".join(wrong), REINSTALL)
    else:
        own = importlib.metadata.version(PROJECT)
        yield Finding("packages", "ok", f"{PROJECT} {own} and the {len(core)} packages that it needs")


def extras(setup: Setup) -> Iterator[Finding]:
    """What else can be installed. Only what is there in part, or needed and not there, is something to mend."""
    try:
        wanted = _requirements()
    except importlib.metadata.PackageNotFoundError:
        return  # `packages` says so
    for extra, purpose in EXTRAS.items():
        members = [one for one in wanted if one.extra == extra]
        wrong = [said for one in members if (said := one.shortfall())]
        mend = f"{sys.executable} -m pip install '{PROJECT}[{extra}]'"
        check = f"extra {extra}"
        if not wrong:
            yield Finding(check, "ok", f"installed, for {purpose}")
        elif extra == "server" and setup.model_url is None:
            yield Finding(check, "problem", f"{'; '.join(wrong)}: {purpose} cannot start", mend)
        elif any("is not" in said for said in wrong):
            yield Finding(check, "warning", f"{'; '.join(wrong)}, for {purpose}", mend)
        else:
            yield Finding(check, "ok", f"not installed; it is for {purpose}: {mend}")


def torch(setup: Setup) -> Iterator[Finding]:
    """Whether torch, where it is installed, can be imported, and what it would run on."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return  # `extras` says so
    ran = run_python("import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'the CPU')")
    if ran.status == 0:
        device = (ran.stdout.splitlines() or ["an unknown device"])[-1]
        yield Finding("torch", "ok", f"torch {version}, running on {device}")
    else:
        yield Finding(
            "torch",
            "problem" if setup.model_url is None else "warning",
            f"torch {version} cannot be imported: {ran.reason}",
            f"{sys.executable} -m pip install --force-reinstall torch; on Linux without an NVIDIA GPU with "
            "--index-url https://download.pytorch.org/whl/cpu",
        )


def start(setup: Setup) -> Iterator[Finding]:
    """Whether the MCP server's modules import, in what time, and without a word on stdout, which is MCP's wire."""
    clock = "import time; t = time.monotonic(); import mcp_server; import sys"
    ran = run_python(f"{clock}; sys.stderr.write(f'\\nseconds {{time.monotonic() - t:.2f}}')")
    if ran.status != 0:
        yield Finding("start", "problem", f"the MCP server cannot be imported: {ran.reason}", REINSTALL)
        return
    if ran.stdout:
        yield Finding(
            "start",
            "problem",
            f"something prints {ran.stdout.strip()[:80]!r} on stdout when Python starts: clients take that for MCP",
            "remove that print: look into sitecustomize.py, usercustomize.py and *.pth files in "
            f"{sysconfig.get_path('purelib')}, and into $PYTHONSTARTUP and wrappers around the command",
        )
    seconds = float(ran.stderr.rsplit("seconds ", 1)[1])
    if seconds > SLOW_START_S:
        yield Finding(
            "start",
            "warning",
            f"the MCP server took {seconds:.0f} s to import; clients give up after half a minute or so",
            "put the environment on a local disk, keep virus scanners from it, or serve over --http",
        )
    elif not ran.stdout:
        yield Finding("start", "ok", f"the MCP server imports in {seconds:.1f} s and prints nothing")


def commands(setup: Setup) -> Iterator[Finding]:
    """Whether this installation's commands are there, and are the ones that PATH leads to."""
    own = Path(sysconfig.get_path("scripts"))
    for name in COMMANDS:
        here, found = shutil.which(name, path=str(own)), shutil.which(name)
        if here is None:
            yield Finding(f"command {name}", "problem", f"not in {own}", REINSTALL)
        elif found is None:
            yield Finding(f"command {name}", "ok", f"{here}; not on PATH, so give clients this whole path")
        elif os.path.samefile(found, here):
            yield Finding(f"command {name}", "ok", here)
        else:
            yield Finding(
                f"command {name}",
                "warning",
                f"PATH leads to {found}, of another installation than {here}",
                f"give clients the whole path, or put {own} first on PATH",
            )
