"""Uploads: handles that work for their owner alone, limits, and images that the access policy would refuse."""

from __future__ import annotations

import os
import shutil
import socket
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_processes import Service, running_service
from mcp_processes import STARTED_S, ModelServer, text_of

from rs_tools.errors import AccessError
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.uploads import NoRoom, TooLarge, UploadedFiles

SCENE = "itaipu_landsat8.tif"
LATER = "raleigh_landsat7.tif"
ALICE, BOB = "alice-000111222333444", "bob-55566677788899900"
UNKNOWN = f"rs-upload://{'0' * 32}"


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    return Path(shutil.copy(root / SCENE, tmp_path_factory.mktemp("hidden-away") / "secret.tif"))


@pytest.fixture(scope="module")
def service(
    root: Path, secret: Path, model_server: ModelServer, token_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Of two callers, with addresses of this machine among the hosts that images may come from."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "tokens").write_text(f"alice {ALICE}\nbob {BOB}\n")
    allowed = folder / "allowed"
    shutil.copytree(root, allowed)
    (allowed / "link.tif").symlink_to(secret)
    (allowed / "folder").symlink_to(secret.parent)
    (allowed / "virtual.tif").write_text(_vrt(secret))
    with zipfile.ZipFile(allowed / "archive.zip", "w") as archive:
        archive.write(secret, "secret.tif")
    shutil.copy(allowed / "archive.zip", allowed / "archive.tif")
    options = ["--root", str(allowed), "--tokens", str(folder / "tokens"), "--uploads", str(folder / "uploads")]
    options += ["--model-url", model_server.url, "--token-file", str(token_file)]
    for host in ("localhost", "127.0.0.1", "2130706433", "0x7f000001", "169.254.169.254", "10.0.0.1"):
        options += ["--allow-url", host]
    with running_service(folder, *options) as running:
        yield running


def _vrt(target: Path) -> str:
    return (
        '<VRTDataset rasterXSize="30" rasterYSize="20"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{target}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )


def uploaded(service: Service, path: Path, token: str = ALICE) -> str:
    answer = service.post("/images", token=token, content=path.read_bytes())
    assert answer.status_code == 201, answer.text
    return answer.json()["image"]


async def test_a_handle_is_taken_wherever_an_image_is(service: Service, root: Path) -> None:
    earlier, later = uploaded(service, root / SCENE), uploaded(service, root / SCENE)
    assert earlier != later
    async with service.client(ALICE) as client:
        for tool, arguments in (
            ("inspect_image", {"image": earlier}),
            ("caption", {"image": earlier}),
            ("vqa", {"image": earlier, "question": "Is there water?", "region": [0, 0, 200, 200]}),
            ("classify", {"image": earlier, "labels": ["lake", "city"]}),
            ("ground", {"image": earlier, "query": "ship", "region": [0, 0, 200, 200]}),
            ("segment", {"image": earlier, "classes": ["water"], "region": [0, 0, 200, 200]}),
            ("detect_change", {"before": earlier, "after": later, "region": [0, 0, 200, 200]}),
        ):
            answer = await client.call_tool(tool, arguments)
            assert not answer.is_error, text_of(answer)


async def test_an_upload_is_answered_as_the_same_file_on_disk_is(service: Service, root: Path) -> None:
    handle = uploaded(service, root / SCENE)
    async with service.client(ALICE) as client:
        answers = [
            (await client.call_tool("inspect_image", {"image": image})).structured_content for image in (handle, SCENE)
        ]
    assert answers[0] is not None
    assert answers[1] is not None
    digests = [answer.pop("provenance")["image_digest"] for answer in answers if answer]
    assert digests[0] == digests[1]
    for told in answers:
        assert told is not None
        told.pop("modality_reason")  # a file's name may say something; an upload has none
    assert answers[0] == answers[1]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_foreign_handle_looks_exactly_like_one_that_was_never_given(
    service: Service, root: Path, mode: str
) -> None:
    handle = uploaded(service, root / SCENE, ALICE)
    async with service.client(BOB, mode) as client:
        foreign = await client.call_tool("inspect_image", {"image": handle})
        unknown = await client.call_tool("inspect_image", {"image": UNKNOWN})
        before = await client.call_tool("detect_change", {"before": handle, "after": SCENE})
    async with service.client(ALICE, mode) as client:
        assert not (await client.call_tool("inspect_image", {"image": handle})).is_error
    assert foreign.is_error
    assert before.is_error
    assert foreign.model_dump() == unknown.model_dump()
    assert text_of(before) == text_of(unknown)
    assert "There is no such upload" in text_of(foreign)


async def test_where_uploads_lie_is_told_to_nobody_and_no_tool_lists_them(service: Service, root: Path) -> None:
    handle = uploaded(service, root / SCENE)
    async with service.client(ALICE) as client:
        listed = await client.call_tool("list_images", {})
        shown = await client.call_tool("inspect_image", {"image": handle})
    for answer in (listed, shown):
        assert "uploads" not in answer.model_dump_json()
    assert handle.rpartition("/")[2] not in service.log.read_text()


@pytest.mark.parametrize("content", ["virtual.tif", "archive.zip", "notes.tif"])
def test_what_the_tools_would_not_open_is_not_kept(service: Service, content: str) -> None:
    folder = service.log.parent
    kept = sorted((folder / "uploads").iterdir())
    answer = service.post("/images", token=ALICE, content=(folder / "allowed" / content).read_bytes())
    assert answer.status_code == 415
    assert "readable: GeoTIFF" in answer.json()["error"]
    assert service.post("/images", token=ALICE, content=b"").status_code == 415
    assert sorted((folder / "uploads").iterdir()) == kept


def test_an_upload_says_its_length_beforehand(service: Service, root: Path) -> None:
    answer = service.post("/images", token=ALICE, content=iter([(root / SCENE).read_bytes()]))
    assert answer.status_code == 411
    assert "Content-Length" in answer.json()["error"]


def test_an_upload_in_chunks_has_no_more_bytes_than_it_announced(service: Service, root: Path) -> None:
    folder = service.log.parent / "uploads"
    kept = sorted(folder.iterdir())
    both = {"Content-Length": "10", "Transfer-Encoding": "chunked"}
    answer = service.post("/images", token=ALICE, content=iter([(root / SCENE).read_bytes()]), headers=both)
    assert answer.status_code == 413
    assert "more than the 10 bytes" in answer.json()["error"]
    assert sorted(folder.iterdir()) == kept


def test_an_upload_that_breaks_off_leaves_nothing(service: Service) -> None:
    folder = service.log.parent / "uploads"
    kept = sorted(folder.iterdir())
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        head = f"POST /images HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ALICE}\r\nContent-Length: 1000\r\n"
        connection.sendall(f"{head}\r\nII*\0".encode())
        deadline = time.monotonic() + STARTED_S
        while sorted(folder.iterdir()) == kept and time.monotonic() < deadline:
            time.sleep(0.01)
    while sorted(folder.iterdir()) != kept:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- names that lead elsewhere, over MCP


@pytest.mark.parametrize(
    "name",
    [
        "../hidden-away/secret.tif",
        "SECRET",  # its absolute path
        "link.tif",
        "folder/secret.tif",
        "FOLDER/secret.tif",
        "folder/../../SECRET",
        "%2e%2e/hidden-away/secret.tif",
        "..%2fhidden-away%2fsecret.tif",
        "..%252fsecret.tif",
        "..\\hidden-away\\secret.tif",
        "\\\\server\\share\\secret.tif",
        "//server/share/secret.tif",
        "file:///SECRET",
        "/vsicurl/http://127.0.0.1:1/a.tif",
        "/VSICURL/http://127.0.0.1:1/a.tif",
        "/vsizip/archive.zip/secret.tif",
        "/vsizip/{archive.zip}/secret.tif",
        "GTIFF_RAW:secret.tif",
        "archive.zip",
        "archive.tif",
        "virtual.tif",
        "<VRTDataset></VRTDataset>",
        "rs-upload://../../../hidden-away/secret.tif",
        "rs-upload://SECRET",
        f"{UNKNOWN}/../secret.tif",
        f"{UNKNOWN.upper()}",
        f"{UNKNOWN}%00",
        f"{UNKNOWN}\n",
    ],
)
async def test_no_name_leads_to_a_file_outside_the_roots(service: Service, secret: Path, name: str) -> None:
    image = name.replace("SECRET", str(secret))
    async with service.client(ALICE) as client:
        refused = await client.call_tool("inspect_image", {"image": image})
        listed = await client.call_tool("list_images", {"folder": image})
    assert refused.is_error
    assert refused.structured_content is None
    assert len(text_of(refused)) < 1000
    if name != "SECRET" and "SECRET" not in name and "hidden-away" not in name:
        assert "hidden-away" not in text_of(refused)
    assert listed.is_error


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "2130706433",  # the same as one number
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "169.254.169.254",
        "10.0.0.1",
        "localhost.",
        "LOCALHOST",
        "user@localhost",
        "localhost%00.example.org",
    ],
)
async def test_no_address_leads_to_this_machine_or_a_private_network(service: Service, host: str) -> None:
    """Most of these hosts are even allowed by name; a listener tells whether anybody came."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        port = listener.getsockname()[1]
        async with service.client(ALICE) as client:
            for address in (f"https://{host}:{port}/a.tif", f"http://{host}:{port}/a.tif", f"https://{host}/a.tif"):
                refused = await client.call_tool("inspect_image", {"image": address})
                assert refused.is_error
                assert refused.structured_content is None
        with pytest.raises(BlockingIOError):
            listener.accept()


# --- the folder of uploads


@pytest.fixture
def files(tmp_path: Path) -> UploadedFiles:
    return UploadedFiles(tmp_path / "uploads", lambda: "a", lifetime_s=100, max_file=10, max_caller=25, max_total=30)


def keep(files: UploadedFiles, content: bytes) -> str:
    with files.receive(len(content)) as incoming:
        incoming.file.write(content)
        return files.keep(incoming).handle


def test_an_upload_is_gone_when_its_time_is_over(files: UploadedFiles) -> None:
    handle = keep(files, b"image")
    path = files.resolve(handle).path
    assert path.read_bytes() == b"image"
    earlier = time.time() - 101
    os.utime(path, (earlier, earlier))
    with pytest.raises(AccessError, match=r"no such upload.*last 1\.66667 minutes"):
        files.resolve(handle)
    keep(files, b"another")
    assert not path.exists()


def test_a_handle_outlives_the_process_that_gave_it(files: UploadedFiles) -> None:
    handle = keep(files, b"image")
    assert UploadedFiles(files.folder, lambda: "a").resolve(handle).path.read_bytes() == b"image"
    with pytest.raises(AccessError):
        UploadedFiles(files.folder, lambda: "b").resolve(handle)


def test_one_upload_one_caller_and_all_callers_have_a_limit_each(files: UploadedFiles) -> None:
    with pytest.raises(TooLarge, match="11 bytes; an upload may have 10"), files.receive(11):
        pass
    keep(files, b"x" * 10)
    with files.receive(10), pytest.raises(NoRoom, match="20 bytes"), files.receive(10):  # what is on its way counts
        pass
    keep(files, b"x" * 10)
    with pytest.raises(NoRoom, match="Your uploads have 20 bytes"), files.receive(6):
        pass
    other = UploadedFiles(files.folder, lambda: "b", lifetime_s=100, max_file=20, max_caller=25, max_total=30)
    with pytest.raises(NoRoom, match="of all callers"), other.receive(11):
        pass
    assert keep(other, b"x" * 10)


def test_uploads_can_be_read_by_their_owner_alone_on_this_machine_too(files: UploadedFiles) -> None:
    path = files.resolve(keep(files, b"image")).path
    assert files.folder.stat().st_mode & 0o077 == 0
    assert path.stat().st_mode & 0o077 == 0


def test_a_server_without_uploads_knows_no_handles(tmp_path: Path) -> None:
    with pytest.raises(AccessError):
        AccessPolicy([tmp_path]).resolve(UNKNOWN)
