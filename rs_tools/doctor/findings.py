"""What a check is told and what it answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warning", "problem"]
PROBE_S = 120.0


@dataclass(frozen=True)
class Setup:
    """What is examined; the names are those of the options of `rs-mcp`.

    Attributes:
        roots: folders that images are to be read from.
        weights: checkpoint of the local model server, a folder or an id on the hub; None is the embedded model.
        model_url, token: of a model server that runs elsewhere; None is the user's local one.
        model: name of another model, where `model_url` is an OpenAI-compatible endpoint.
        artifacts: folder of the files of answers; None is the default one.
        home, folder: where clients' configurations are looked for.
        ports: that the servers listen on where nothing else is said: number -> the command it is for.
    """

    roots: tuple[Path, ...] = ()
    weights: str | None = None
    model_url: str | None = None
    token: str | None = None
    model: str | None = None
    artifacts: Path | None = None
    home: Path = field(default_factory=Path.home)
    folder: Path = field(default_factory=Path.cwd)
    ports: tuple[tuple[int, str], ...] = ((8765, "rs-model-server"), (8000, "rs-mcp --http"))


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: what was looked at.
        status: ok; warning: works, but not for everyone or not for long; problem: something will fail.
        found: what is the case.
        mend: what to do about it; empty exactly where the status is ok.
    """

    check: str
    status: Status
    found: str
    mend: str = ""

    def __post_init__(self) -> None:
        if (self.status == "ok") == bool(self.mend):
            raise ValueError(f"{self.check}: a warning or problem says how to mend it, and nothing else does")


Check = Callable[[Setup], Iterable[Finding]]


@dataclass(frozen=True)
class Report:
    findings: list[Finding]

    @property
    def status(self) -> Status:
        """The worst of all findings."""
        found = {finding.status for finding in self.findings}
        return "problem" if "problem" in found else "warning" if "warning" in found else "ok"

    def to_json(self) -> str:
        return json.dumps({"status": self.status, "findings": [asdict(one) for one in self.findings]}, indent=2)

    def to_text(self) -> str:
        """A line or two for each finding, and one for all of them."""
        lines = []
        for one in self.findings:
            lines.append(f"{one.status:<8} {one.check}: {one.found}")
            if one.mend:
                lines.append(f"{'':<8} -> {one.mend}")
        counts = {status: sum(one.status == status for one in self.findings) for status in ("problem", "warning")}
        said = ", ".join(f"{count} {status}{'s' * (count > 1)}" for status, count in counts.items() if count)
        return "\n".join([*lines, "", said or "Everything is as it should be."])


@dataclass(frozen=True)
class Ran:
    """How a piece of Python ended in a process of its own, where a crash or a print harms nobody."""

    status: int | None  # None: it did not end in time
    stdout: str
    stderr: str

    @property
    def reason(self) -> str:
        """The last words of a failure."""
        if self.status is None:
            return f"no end after {PROBE_S:.0f} s"
        lines = self.stderr.strip().splitlines()
        return lines[-1][:300] if lines else f"ended with status {self.status}"


def run_python(code: str) -> Ran:
    # -P: as for an installed command, no module of the working folder stands in for an installed one.
    command = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=PROBE_S
        )
    except subprocess.TimeoutExpired:
        return Ran(None, "", "")
    return Ran(done.returncode, done.stdout, done.stderr)
