"""Images behind https addresses: which are asked, where connections go, and how little is fetched."""

from __future__ import annotations

import datetime
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpcore
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mcp import Client
from rasters import UTM, ScriptedClient, noise, write

import mcp_server
from rs_tools.errors import AccessError, ImageError
from rs_tools.imagery import remote
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.remote import RemoteFiles, RemoteImage, is_public
from rs_tools.imagery.scene import Scene
from rs_tools.tools import Tools

HOST, OTHER = "data.example.org", "other.example.org"
PUBLIC = "93.184.215.14"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by range requests over TLS; `behave` may answer a path in its place."""

    def __init__(self, trust: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.socket = trust.wrap_socket(self.socket, server_side=True)
        self.files: dict[str, bytes] = {}
        self.behave: dict[str, Callable[[Handler], None]] = {}
        self.ranges: list[tuple[int, int]] = []
        self.versions: dict[str, str] = {}

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up in mid-answer is part of the tests


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        assert isinstance(server, Server)
        if path in server.behave:
            return server.behave[path](self)
        if path not in server.files:
            return self.answer(404, {}, b"")
        data = server.files[path]
        start, end = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
        piece = data[start : end + 1]
        server.ranges.append((start, len(piece)))
        headers = {
            "Content-Range": f"bytes {start}-{start + len(piece) - 1}/{len(data)}",
            "ETag": server.versions.get(path, '"1"'),
        }
        return self.answer(206, headers, piece)

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class ToServer(httpcore.SyncBackend):
    """Goes to the test's own server in place of the address it is told, which it remembers."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port, self.asked = port, []

    def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        self.asked.append((host, port))
        return super().connect_tcp("127.0.0.1", self.port, *args, **kwargs)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of the two hosts, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST), x509.DNSName(OTHER)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "certificate.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def server(certificate: Path) -> Iterator[Server]:
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust.load_cert_chain(certificate)
    running = Server(trust)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def dial(server: Server) -> ToServer:
    return ToServer(server.server_port)


@pytest.fixture
def policy(tmp_path: Path, certificate: Path, dial: ToServer) -> AccessPolicy:
    """Allows `HOST`, whose name leads to a public address; connections to it end at the test's server."""
    allowed = AccessPolicy([tmp_path])
    allowed.remote = RemoteFiles([HOST], lambda host, port: [PUBLIC], dial, _trusting(certificate))
    return allowed


def _trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


def url(name: str, host: str = HOST) -> str:
    return f"https://{host}/{name}"


def served(server: Server, tmp_path: Path, name: str, values: np.ndarray, **profile: Any) -> bytes:
    path = write(tmp_path / name, values, **profile)
    server.files[f"/{name}"] = path.read_bytes()
    path.unlink()
    return server.files[f"/{name}"]


# --- reading


@pytest.mark.parametrize(
    ("name", "driver"),
    [("a.tif", "GTiff"), ("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("a.jp2", "JP2OpenJPEG")],
)
def test_an_image_behind_an_address_reads_as_the_same_file_on_disk_does(
    policy: AccessPolicy, server: Server, tmp_path: Path, name: str, driver: str
) -> None:
    data = served(server, tmp_path, name, noise(3, 300, 400), driver=driver)
    (tmp_path / name).write_bytes(data)
    far, near = Scene.open(policy, url(name)), Scene.open(policy, name)
    assert (far.width, far.height, far.source.name) == (400, 300, name)
    with far.reader() as read_far, near.reader() as read_near:
        for window, size in [((0, 0, 400, 300), (100, 75)), ((30, 40, 90, 100), (60, 60))]:
            np.testing.assert_array_equal(read_far(window, size).rgb, read_near(window, size).rgb)


def test_an_overview_of_a_cog_is_fetched_without_the_rest_of_the_file(
    policy: AccessPolicy, server: Server, tmp_path: Path
) -> None:
    data = served(
        server, tmp_path, "cog.tif", noise(3, 2400, 2400), driver="COG", blocksize=256, crs="EPSG:32633", transform=UTM
    )
    assert len(data) > 16_000_000
    scene = Scene.open(policy, url("cog.tif"))
    assert scene.georeference is not None
    pixels = scene.read(scene.region([]), (300, 300))
    assert pixels.valid.all()
    fetched = sum(count for _, count in server.ranges)
    assert fetched < len(data) / 20
    scene.read(scene.region([]), (300, 300))
    assert sum(count for _, count in server.ranges) == fetched  # what was fetched is kept


async def test_the_tools_take_an_address_where_they_take_a_path(
    policy: AccessPolicy, server: Server, tmp_path: Path
) -> None:
    served(server, tmp_path, "a.tif", noise(3, 60, 80), photometric="RGB")
    tools = Tools(policy, ScriptedClient())
    assert (await tools.caption(url("a.tif?signature=x"))).caption == "A river."
    assert (await tools.inspect_image(url("a.tif"))).width == 80


def test_a_file_that_changes_on_its_server_is_not_mixed_with_what_was_read_before(
    policy: AccessPolicy, server: Server, tmp_path: Path
) -> None:
    served(server, tmp_path, "a.tif", noise(3, 600, 600), photometric="RGB", tiled=True)
    scene = Scene.open(policy, url("a.tif"))
    server.versions["/a.tif"] = '"2"'
    with pytest.raises(ImageError, match="changed on its server"):
        scene.read(scene.region([]), (600, 600))


def test_one_opening_fetches_no_more_than_its_limit(
    policy: AccessPolicy, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(server, tmp_path, "a.tif", noise(3, 900, 900), photometric="RGB", tiled=True)
    scene = Scene.open(policy, url("a.tif"))
    monkeypatch.setattr(remote, "MAX_FETCHED", 500_000)
    assert scene.read((0, 0, 100, 100), (100, 100)).valid.all()
    with pytest.raises(ImageError, match="smaller region, or download"):
        scene.read(scene.region([]), (900, 900))


def test_a_file_larger_than_the_limit_is_not_begun(
    policy: AccessPolicy, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/a.tif"] = b"II*\0" + bytes(5000)
    monkeypatch.setattr(remote, "MAX_FILE", 4000)
    with pytest.raises(ImageError, match="at most"):
        Scene.open(policy, url("a.tif"))


# --- what is not asked


def test_addresses_are_not_read_unless_hosts_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=r"download the image.*--allow-url"):
        AccessPolicy([tmp_path]).resolve(url("a.tif"))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (f"http://{HOST}/a.tif", "Only https"),
        ("ftp://data.example.org/a.tif", "Only https"),
        ("file:///etc/passwd", "path alone"),
        (url("a.tif", OTHER), f"not allowed. Allowed hosts: {HOST}"),
        (url("a.tif", f"{HOST}:8443"), "not allowed"),
        (url("a.tif", f"{HOST}."), "not allowed"),
        (url("a.tif", f"{HOST}.evil.org"), "not allowed"),
        (url("a.tif", f"evil.org#@{HOST}"), "not allowed"),
        (url("a.tif", f"user:word@{HOST}"), "user name"),
        (url("a.tif", "127.0.0.1"), "not allowed"),
        ("https://[::1]/a.tif", "not allowed"),
        ("https://data.example.org:x/a.tif", "not a URL"),
    ],
)
def test_an_address_that_is_not_allowed_is_refused_before_anything_is_asked(
    policy: AccessPolicy, dial: ToServer, address: str, reason: str
) -> None:
    with pytest.raises(AccessError, match=reason):
        policy.resolve(address)
    assert dial.asked == []


@pytest.mark.parametrize(
    "host", ["", "*", "*.example.org", "https://example.org", "example.org/path", "u@example.org", "a b"]
)
def test_what_is_allowed_must_be_a_plain_host(tmp_path: Path, host: str) -> None:
    with pytest.raises(AccessError, match="is not a host"):
        AccessPolicy([tmp_path], [host])


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 127.8.8.8 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 240.0.0.1
    255.255.255.255 192.0.2.1 198.18.0.1 203.0.113.7 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd12::1 ff02::1 2001:db8::1
    ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::a00:1 2002:7f00:1:: 2001:0:1::1
    2130706433 0x7f.1 0177.0.0.1 localhost""".split(),
)
def test_addresses_that_are_not_of_the_public_internet_are_told(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
def test_addresses_of_the_public_internet_are_told(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("found", [["10.0.0.1"], [PUBLIC, "127.0.0.1"], ["::ffff:10.0.0.1"], []])
def test_a_host_with_any_address_that_is_not_public_is_not_asked(
    policy: AccessPolicy, dial: ToServer, certificate: Path, found: list[str]
) -> None:
    policy.remote = RemoteFiles([HOST], lambda host, port: found, dial, _trusting(certificate))
    with pytest.raises(AccessError, match="not public"):
        policy.resolve(url("a.tif"))
    assert dial.asked == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "[::ffff:127.0.0.1]"])
def test_other_spellings_of_this_machine_are_not_asked_even_where_they_are_allowed(tmp_path: Path, host: str) -> None:
    with pytest.raises(AccessError, match=r"not public|not a host"):
        AccessPolicy([tmp_path], [host]).resolve(url("a.tif", host))  # with the system's own resolver


def test_the_connection_goes_to_the_address_that_was_checked(
    policy: AccessPolicy, server: Server, dial: ToServer, certificate: Path, tmp_path: Path
) -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"]])  # a name that leads elsewhere when it is looked up a second time

    def resolve(host: str, port: int) -> Sequence[str]:
        return next(answers)

    served(server, tmp_path, "a.tif", noise(3, 60, 80))
    policy.remote = RemoteFiles([HOST], resolve, dial, _trusting(certificate))
    Scene.open(policy, url("a.tif"))
    assert dial.asked == [(PUBLIC, 443)]


def test_a_server_that_cannot_prove_its_name_is_not_read(
    policy: AccessPolicy, server: Server, dial: ToServer, certificate: Path, tmp_path: Path
) -> None:
    served(server, tmp_path, "a.tif", noise(3, 60, 80))
    for allowed, trust in [(HOST, ssl.create_default_context()), ("third.example.org", _trusting(certificate))]:
        policy.remote = RemoteFiles([allowed], lambda host, port: [PUBLIC], dial, trust)
        with pytest.raises(ImageError, match=r"cannot be reached: .*certificate"):
            policy.resolve(url("a.tif", allowed))
    assert server.ranges == []


# --- redirects and other answers


def redirect(to: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(302, {"Location": to}, b"")


def test_a_redirect_is_followed_to_where_it_may_lead(policy: AccessPolicy, server: Server, tmp_path: Path) -> None:
    served(server, tmp_path, "a.tif", noise(3, 60, 80))
    server.behave["/moved.tif"] = redirect("/a.tif")
    assert Scene.open(policy, url("moved.tif")).width == 80


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        (f"http://{HOST}/a.tif", "Only https"),
        (url("a.tif", OTHER), "not allowed"),
        ("https://169.254.169.254/latest/meta-data", "not allowed"),
        ("file:///etc/passwd", "path alone"),
        ("/moved.tif", "redirects"),
    ],
)
def test_each_redirect_is_checked_as_the_first_address_was(
    policy: AccessPolicy, server: Server, dial: ToServer, to: str, reason: str
) -> None:
    server.behave["/moved.tif"] = redirect(to)
    with pytest.raises(AccessError, match=reason):
        policy.resolve(url("moved.tif"))
    assert {address for address, _ in dial.asked} == {PUBLIC}


async def test_a_redirect_that_leads_elsewhere_is_refused_over_mcp(
    policy: AccessPolicy, server: Server, dial: ToServer
) -> None:
    server.behave["/moved.tif"] = redirect("https://169.254.169.254/latest/meta-data")
    async with Client(mcp_server.build_server(policy)) as client:
        refused = await client.call_tool("inspect_image", {"image": url("moved.tif")})
    assert refused.is_error
    assert "not allowed" in refused.model_dump_json()
    assert {address for address, _ in dial.asked} == {PUBLIC}


@pytest.mark.parametrize(
    ("behave", "error", "reason"),
    [
        (lambda handler: handler.answer(404, {}, b""), AccessError, "404"),
        (lambda handler: handler.answer(500, {}, b"oops"), ImageError, "500"),
        (lambda handler: handler.answer(200, {}, b"II*\0"), ImageError, "does not send parts"),
        (lambda handler: handler.answer(206, {}, b"II*\0"), ImageError, "how large"),
        (lambda handler: handler.answer(206, {"Content-Range": "bytes 0-3/99999"}, b"II*\0"), ImageError, "in place"),
        (
            lambda handler: handler.answer(206, {"Content-Range": "bytes 0-9/9"}, bytes(remote.BLOCK + 1)),
            ImageError,
            "more than it was asked",
        ),
        (lambda handler: handler.answer(206, {"Content-Range": "bytes 0-4/5"}, b"Hello"), ImageError, "a text file"),
        (lambda handler: handler.wfile.write(b"not HTTP at all\r\n\r\n"), ImageError, "cannot be reached"),
    ],
)
def test_an_answer_that_is_of_no_use_is_named_for_what_it_is(
    policy: AccessPolicy, server: Server, behave: Callable[[Handler], None], error: type[Exception], reason: str
) -> None:
    server.behave["/a.tif"] = behave
    with pytest.raises(error, match=reason):
        Scene.open(policy, url("a.tif"))


def test_a_server_that_trickles_is_given_up(
    policy: AccessPolicy, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def trickle(handler: Handler) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", "bytes 0-65535/65536")
        handler.send_header("Content-Length", "65536")
        handler.end_headers()
        while not go_on.wait(0.01):
            handler.wfile.write(b"x")

    server.behave["/a.tif"] = trickle
    monkeypatch.setattr(remote, "REQUEST_S", 0.2)
    with pytest.raises(ImageError, match="too slow"):
        policy.resolve(url("a.tif"))
    go_on.set()


def test_the_name_of_an_image_is_the_last_part_of_its_address_without_its_query() -> None:
    assert RemoteImage("https://x.org/a/b.tif?key=1", "", 0, "").name == "b.tif"


def test_the_mcp_server_takes_hosts_and_refuses_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[AccessPolicy] = []

    def build(policy: AccessPolicy, *args: object, **options: object) -> object:
        policies.append(policy)
        raise SystemExit(0)

    monkeypatch.setattr(mcp_server, "build_server", build)
    with pytest.raises(SystemExit):
        mcp_server.main(["--root", str(tmp_path), "--allow-url", HOST, "--allow-url", f"{OTHER}:8443"])
    assert policies[0].remote.hosts == {HOST, f"{OTHER}:8443"}
    with pytest.raises(SystemExit):
        mcp_server.main(["--root", str(tmp_path), "--allow-url", "*.example.org"])
    assert "'*.example.org' is not a host" in capsys.readouterr().err
