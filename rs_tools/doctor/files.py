"""What lies on the disk: raster libraries and their data, weights, readable and writable folders."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rs_tools.doctor.findings import Finding, Setup, run_python
from rs_tools.user_folder import artifacts_folder, user_folder

LEAST_FREE = 2**30
NEEDED_DRIVERS = {"GTiff", "PNG", "JPEG", "COG"}
# Set by other GIS software for itself, they lead our libraries to data of another version.
MISLEADING = ("PROJ_LIB", "PROJ_DATA", "GDAL_DATA", "GDAL_DRIVER_PATH", "GDAL_SKIP")
LFS_POINTER = b"version https://git-lfs"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_LOOKED_AT = 20_000  # files, until a folder counts as one without images
_RASTER_PROBE = """
import json, pyproj, rasterio
from rasterio.warp import transform
with rasterio.Env() as env:
    drivers = sorted(env.drivers())
[lon], [lat] = transform("EPSG:32633", "EPSG:4326", [500_000], [5_000_000])
pyproj.CRS.from_epsg(32633)
versions = f"rasterio {rasterio.__version__}, GDAL {rasterio.__gdal_version__}, PROJ {pyproj.proj_version_str}"
print(json.dumps({"versions": versions, "drivers": drivers, "place": [lon, lat]}))
"""


def raster_libraries(setup: Setup) -> Iterator[Finding]:
    """Whether rasterio and pyproj work, with their drivers and their data of projections."""
    check = "raster libraries"
    foreign = [f"{name}={os.environ[name]}" for name in MISLEADING if os.environ.get(name)]
    reinstall = f"{sys.executable} -m pip install --force-reinstall rasterio pyproj"
    mend = f"unset {' '.join(one.partition('=')[0] for one in foreign)}" if foreign else reinstall
    blamed = f"; {', '.join(foreign)} is set" if foreign else ""
    ran = run_python(_RASTER_PROBE)
    if ran.status != 0:
        yield Finding(check, "problem", f"they do not work: {ran.reason}{blamed}", mend)
        return
    facts = json.loads(ran.stdout.splitlines()[-1])
    missing = NEEDED_DRIVERS - set(facts["drivers"])
    lon, lat = facts["place"]
    if missing:
        yield Finding(
            check, "problem", f"{facts['versions']} have no driver for {', '.join(sorted(missing))}{blamed}", mend
        )
    elif not (abs(lon - 15) < 1e-6 and 45 < lat < 46):
        yield Finding(check, "problem", f"{facts['versions']} put a place of Europe at {lon}, {lat}{blamed}", mend)
    elif foreign:
        found = f"{facts['versions']} work, but with data that {', '.join(foreign)} leads them to"
        yield Finding(check, "warning", found, mend)
    else:
        yield Finding(check, "ok", facts["versions"])


def weights(setup: Setup) -> Iterator[Finding]:
    """Whether the local server's checkpoint is there and whole."""
    if setup.model_url is not None:
        return
    folder = weights_folder(setup)
    if not folder.exists():
        if setup.weights and _HUB_ID.fullmatch(setup.weights):
            yield Finding("weights", "ok", f"{setup.weights} is no folder here: an id on the Hugging Face hub")
        else:
            yield Finding("weights", "problem", f"{folder} does not exist", "give --weights a folder that exists")
        return
    try:
        yield _published(folder) if is_published(folder) else _own(folder, setup.weights is None)
    except OSError as error:
        yield Finding("weights", "problem", f"{folder} cannot be read: {error.strerror}", "make it readable for you")


def weights_folder(setup: Setup) -> Path:
    """Where the weights are, if they are on this disk."""
    return Path(setup.weights).expanduser() if setup.weights else embedded_weights()


def is_published(folder: Path) -> bool:
    """Whether a folder is laid out as published checkpoints are and not as ours."""
    if any((folder / part).exists() for part in ("checkpoint", "adapter", "adapter_config.json")):
        return True
    config = folder / "config.json"
    return config.is_file() and b'"model_type"' in config.read_bytes()


def _published(folder: Path) -> Finding:
    tensors = sorted(folder.rglob("*.safetensors"))
    missing = [
        str(index.with_name(name))
        for index in folder.rglob("*.safetensors.index.json")
        for name in set(re.findall(r'"([^"/]+\.safetensors)"', index.read_text()))
        if not index.with_name(name).is_file()
    ]
    broken = [f"{name} is missing" for name in sorted(missing)] + [said for file in tensors if (said := _fault(file))]
    if broken:
        return Finding("weights", "problem", "; ".join(broken), "fetch the published checkpoint again")
    size = sum(file.stat().st_size for file in tensors)
    return Finding("weights", "ok", f"{folder}: a published checkpoint, {size / 1e9:.1f} GB in {len(tensors)} files")


def _own(folder: Path, embedded: bool) -> Finding:
    from model_server.checkpoints.layout import DENSE_TENSORS, REQUIRED, TENSORS, weights_digest

    again = "get them again: git lfs pull, or a fresh copy of the project" if embedded else "copy it again"
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        mend = again if embedded else "give --weights a folder that holds a checkpoint"
        return Finding("weights", "problem", f"{folder} has no {', '.join(missing)}", mend)
    tensors = [folder / name for name in (TENSORS, DENSE_TENSORS) if (folder / name).is_file()]
    if broken := [said for file in tensors if (said := _fault(file))]:
        return Finding("weights", "problem", "; ".join(broken), again)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    found = f"{folder}: {size / 1e6:.0f} MB, digest {weights_digest(folder)}"
    words_only = "; it answers in words only: no boxes, masks and change" * (len(tensors) == 1)
    return Finding("weights", "ok", found + words_only)


def embedded_weights() -> Path:
    spec = importlib.util.find_spec("model_server")
    assert spec is not None  # the package beside ours
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "weights" / "nano"


def _fault(file: Path) -> str:
    """What is wrong with a safetensors file, by its own account of its size; empty where it is whole."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if LFS_POINTER.startswith(start) and start:
            return f"{file} is a git-lfs pointer of {size} bytes, not the weights"
        length = int.from_bytes(start, "little")
        header = opened.read(length) if length < size else b""
    try:
        tensors = json.loads(header)
        end = max(one["data_offsets"][1] for name, one in tensors.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{file} ({size} bytes) is no safetensors file"
    whole = 8 + length + end
    return "" if size == whole else f"{file} is damaged: it has {size} of its {whole} bytes"


def roots(setup: Setup) -> Iterator[Finding]:
    """Whether the folders of images can be read, and hold some."""
    for root in setup.roots:
        folder, check = root.expanduser().resolve(), f"root {root}"
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            yield Finding(check, "problem", f"{folder} {what}", "give --root a folder that exists")
        elif not os.access(folder, os.R_OK | os.X_OK):
            yield Finding(check, "problem", f"{folder} may not be read by you", f"chmod u+rx {folder}")
        else:
            yield _images(check, folder)


def _images(check: str, folder: Path) -> Finding:
    try:
        from rs_tools.imagery.access import EXTENSIONS
    except ImportError:  # `raster_libraries` says why
        return Finding(check, "ok", f"{folder} can be read")
    looked = 0
    for where, _, names in os.walk(folder):
        image = next((name for name in names if Path(name).suffix.lower() in EXTENSIONS), None)
        if image is not None:
            return Finding(check, "ok", f"{folder} can be read and holds images, such as {Path(where, image)}")
        looked += len(names)
        if looked > _LOOKED_AT:
            return Finding(check, "ok", f"{folder} can be read; no image is among its first {looked} files")
    return Finding(
        check,
        "warning",
        f"{folder} can be read, but holds no image ({' '.join(sorted(EXTENSIONS))})",
        "give --root the folder that your images are in, or turn them into GeoTIFF (gdal_translate)",
    )


def folders(setup: Setup) -> Iterator[Finding]:
    """Whether state, log and the files of answers can be written, and whether there is room for them."""
    if setup.model_url is None:
        yield _writable("state folder", user_folder(), "set RS_PERCEPTION_STATE to a folder of your own", private=True)
    artifacts = setup.artifacts.expanduser() if setup.artifacts else artifacts_folder()
    other = "give --artifacts a folder of your own" if setup.artifacts else "set RS_PERCEPTION_STATE to such a folder"
    yield _writable("artifacts folder", artifacts, other, private=False)


def _writable(check: str, folder: Path, mend: str, private: bool) -> Finding:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return Finding(check, "problem", f"{folder} cannot be made: {nearest} is a file", mend)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return Finding(check, "problem", f"nothing can be written to {nearest}: {error.strerror}", mend)
    status = nearest.stat()
    if private and nearest == folder and sys.platform != "win32":
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            found = f"{folder} can be written by others, so no model server is kept there"
            return Finding(check, "problem", found, f"chmod 700 {folder}, or {mend}")
    free = shutil.disk_usage(nearest).free
    found = f"{folder}: {free / 1e9:.1f} GB free"
    if free < LEAST_FREE:
        return Finding(check, "warning", found, f"make room: masks of large scenes need it; or {mend}")
    return Finding(check, "ok", found if nearest == folder else f"{found}; it is made when first needed")
