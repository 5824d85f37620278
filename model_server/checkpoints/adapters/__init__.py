"""Adapters: each reads one published layout into our modules. A family is found by what is in its folder.

Each module has `NAME`, `recognises(folder) -> bool`, `load(folder, ...)` and is imported when it is wanted.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from model_server.checkpoints.store import WeightsError

FAMILIES = ("rsunivlm", "mfrsvlm", "fusar", "llava", "qwen_vl")


class UnknownFamily(WeightsError):
    """No adapter knows the layout of a folder."""


def find_family(folder: Path) -> ModuleType:
    """The adapter for a checkpoint's folder.

    Raises:
        UnknownFamily: no adapter recognises it.
    """
    for name in FAMILIES:
        if importlib.util.find_spec(f"{__name__}.{name}") is None:
            continue
        module = importlib.import_module(f"{__name__}.{name}")
        if module.recognises(folder):
            return module
    raise UnknownFamily(
        f"{folder} is no published checkpoint that an adapter knows ({', '.join(FAMILIES)}); "
        "its config.json or adapter_config.json decides"
    )
