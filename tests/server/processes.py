"""Real model server processes for tests, and requests with real answers to compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from model_server.protocol import PerceiveRequest

REQUESTS = [
    PerceiveRequest(task="caption"),
    PerceiveRequest(task="vqa", text="Is there a road in the image?"),
    PerceiveRequest(task="classify", labels=["forest", "harbor", "runway"]),
]


def picture(seed: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


@dataclass
class ServerProcess:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_until_ready(self) -> None:
        with httpx.Client(timeout=300) as client:
            while client.get(f"{self.url}/ready").status_code != 200:
                time.sleep(0.02)


@contextmanager
def server_process(log: Path, *arguments: str) -> Iterator[ServerProcess]:
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "model_server.app", "--port", "0", "--threads", "1", *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        assert process.stdout is not None
        with process.stdout as stdout:
            line = stdout.readline()
        assert line, log.read_text()
        yield ServerProcess(process, json.loads(line)["url"], log)
    finally:
        process.kill()
        process.wait()
