"""Inputs from addresses: what is refused, and that what is allowed arrives whole."""

import hashlib
import http.server
import socket
import threading
import time
import zlib

import httpcore
import pytest

from contentfactory import net
from contentfactory.errors import InputError, TransientError
from worker.fetch import fetch_url

BODY = bytes(range(256)) * 50


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        routes = {"/ok": 200, "/gone": 404, "/broken": 503, "/empty": 200, "/endless": 200}
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        if self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
            return
        self.send_response(routes.get(self.path, 404))
        self.send_header("Content-Type", "image/png; charset=x")
        self.end_headers()
        if self.path == "/ok":
            self.wfile.write(BODY)
        if self.path == "/endless":
            try:
                while True:
                    self.wfile.write(BODY)
            except OSError:
                pass

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def get(url, folder, **options):
    return fetch_url(url, folder, **{"max_bytes": 100_000, "timeout_s": 5, "allow_private": True, **options})


def test_a_file_arrives_whole(server, tmp_path):
    found = get(f"{server}/ok", tmp_path)
    assert found.read_bytes() == BODY
    assert (found.media_type, found.path.stem) == ("image/png", hashlib.sha256(BODY).hexdigest())


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [("/gone", InputError, "404"), ("/broken", TransientError, "503"), ("/empty", InputError, "empty"), ("/endless", InputError, "more than 100000"),
     ("/away", InputError, "not http"), ("/loop", InputError, "redirects")],
)  # fmt: skip
def test_bad_answers(server, tmp_path, path, error, words):
    with pytest.raises(error, match=words):
        get(server + path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loopback_is_refused_by_default(server, tmp_path):
    with pytest.raises(InputError, match="not public"):
        get(f"{server}/ok", tmp_path, allow_private=False)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1", "fe80::1%eth0",
     "fc00::1", "64:ff9b::a00:1", "2002:7f00:1::", "::ffff:127.0.0.1", "2001:0:1::1", "not an address"],
)  # fmt: skip
def test_what_is_not_public(address):
    assert not net.is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_what_is_public(address):
    assert net.is_public(address)


@pytest.mark.parametrize("url", ["ftp://a/b", "file:///etc/passwd", "http://", "http://user:pw@host/", "gopher://x", "http://[::1"])
def test_bad_addresses(url):
    with pytest.raises(InputError):
        net.check_url(url)


# Hostile names, addresses and servers

PUBLIC, PRIVATE = "93.184.216.34", "10.0.0.7"


@pytest.fixture
def quick():
    """Nothing here waits, but for what waits for its time to run out."""
    started, worked = time.monotonic(), time.process_time()
    yield
    # A second of work at most; the wall clock has room for busy neighbours, and none for a time-out of ours.
    assert time.process_time() - worked < 1
    assert time.monotonic() - started < 5


@pytest.fixture
def network(monkeypatch):
    """Names answer what the test says, one answer after the other; connections are noted, and answered from a script."""

    class Network:
        def __init__(self):
            self.answers: dict[str, list[list[str]]] = {}
            self.script: list[bytes] = []
            self.asked: list[str] = []
            self.connected: list[str] = []

    found = Network()

    def getaddrinfo(host, port, **kwargs):
        found.asked.append(host)
        answers = found.answers[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]

    def connect_tcp(self, host, port, **kwargs):
        found.connected.append(host)
        if not found.script:
            raise httpcore.ConnectError("nobody there")
        return httpcore.MockStream([found.script.pop(0), b""])

    monkeypatch.setattr(net.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect_tcp)
    return found


def redirect(to):
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"


def test_a_name_is_asked_once_and_the_checked_address_is_used(network, tmp_path, quick):
    network.answers["rebind.example"] = [[PUBLIC], [PRIVATE]]
    network.script = [ANSWER]
    assert get("http://rebind.example/a.png", tmp_path, allow_private=False).read_bytes() == b"abc"
    assert (network.asked, network.connected) == (["rebind.example"], [PUBLIC])


def test_a_name_that_turns_private_on_the_second_hop_is_refused(network, tmp_path, quick):
    network.answers["rebind.example"] = [[PUBLIC], [PRIVATE]]
    network.script = [redirect("http://rebind.example/2"), ANSWER]
    with pytest.raises(InputError, match=r"10\.0\.0\.7, which is not public"):
        get("http://rebind.example/1", tmp_path, allow_private=False)
    assert network.connected == [PUBLIC]


def test_one_private_address_among_public_ones_is_enough(network, tmp_path, quick):
    network.answers["mixed.example"] = [[PUBLIC, PRIVATE]]
    with pytest.raises(InputError, match="not public"):
        get("http://mixed.example/", tmp_path, allow_private=False)
    assert network.connected == []


def test_few_of_many_addresses_are_tried(network, tmp_path, quick):
    network.answers["many.example"] = [[f"93.184.216.{n}" for n in range(1, 200)]]
    with pytest.raises(TransientError):
        get("http://many.example/", tmp_path, allow_private=False)
    assert len(network.connected) == net.MAX_ADDRESSES


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::ffff:7f00:1", "64:ff9b::7f00:1", "2002:7f00:1::", "169.254.169.254", "fd00::1",
     "fe80::1", "::127.0.0.1", "192.0.2.1", "240.0.0.1", "255.255.255.255", "ff02::1"],
)  # fmt: skip
def test_redirects_to_the_inside_are_refused(network, tmp_path, quick, address):
    host = f"[{address}]" if ":" in address else address
    network.answers = {"public.example": [[PUBLIC]], address: [[address]]}
    network.script = [redirect(f"http://{host}/latest/meta-data/"), ANSWER]
    with pytest.raises(InputError, match="not public"):
        get("http://public.example/", tmp_path, allow_private=False)
    assert network.connected == [PUBLIC]


@pytest.mark.parametrize(
    "to",
    ["file:///etc/passwd", "ftp://public.example/", "gopher://public.example/", "unix:/run/docker.sock", "data:text/plain,x", "http://user:pw@public.example/",
     "http://public.example:22/", "http://2130706433/", "http://0x7f.1/", "http://[::1", "//2130706433/"],
)  # fmt: skip
def test_redirects_to_other_things_are_refused(network, tmp_path, quick, to):
    network.answers["public.example"] = [[PUBLIC]]
    network.script = [redirect(to), ANSWER]
    with pytest.raises((InputError, TransientError)) as told:
        get("http://public.example/", tmp_path, allow_private=False)
    assert isinstance(told.value, InputError), told.value
    assert network.connected == [PUBLIC]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    ["http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://0177.0.0.1/", "http://127.1/", "http://1572395042/", "http://127.0.0.1./",
     "http://0/", "http://1.2.3.4.5/", "http://host:22/", "http://host:0/", "http://host:6/", "http://host:99999/", "http://user@host/", "http://:pw@host/",
     "http://[::1", "http://[fe80::1%25eth0]x/", "http://a b/", "http://a\r\nHost: b/", "http:///etc/passwd", "//host/", "http:host", "javascript:alert(1)",
     "http://１２７.０.０.１/", "http://ⓛocalhost/", "http://loc\u00adalhost:22/", "http://" + "a" * 70_000 + "/", "http://ex\0ample/"],
)  # fmt: skip
def test_odd_forms_are_refused(network, tmp_path, quick, url):
    network.answers = _Nothing()
    with pytest.raises(InputError):
        get(url, tmp_path, allow_private=False)
    assert network.connected == []


class _Nothing(dict):
    """Every name answers loopback."""

    def __missing__(self, host):
        return [["127.0.0.1"]]


def test_homographs_are_checked_like_any_name(network, tmp_path, quick):
    """A name of look-alike letters is another name, in its encoded form; where it leads is what counts."""
    network.answers["xn--pple-43d.com"] = [["127.0.0.1"]]
    for url in ("http://аpple.com/", "http://xn--pple-43d.com/", "http://XN--PPLE-43D.com/"):
        with pytest.raises(InputError, match="not public"):
            get(url, tmp_path, allow_private=False)
    assert {host.lower() for host in network.asked} == {"xn--pple-43d.com"}


@pytest.fixture
def raw():
    """A server that sends what a function yields, whatever was asked."""
    servers = []

    def serve(parts):
        listener = socket.create_server(("127.0.0.1", 0))
        servers.append(listener)

        def run():
            try:
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        for part in parts():
                            connection.sendall(part)
            except OSError:
                pass

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/file.png"

    yield serve
    for one in servers:
        one.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


def drip(first, each):
    def parts():
        yield first
        while True:
            time.sleep(0.05)
            yield each

    return parts


@pytest.mark.parametrize(
    "parts",
    [drip(HEAD + b"\r\n", b"x"), drip(HEAD, b"x-slow: 1\r\n"), drip(b"HTTP/1.1", b" "), drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
     drip(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n")],
    ids=["body", "headers", "status line", "continue", "chunks"],
)  # fmt: skip
def test_a_dripping_server_gets_no_more_than_its_time(raw, tmp_path, parts):
    started = time.monotonic()
    with pytest.raises((TransientError, InputError)):
        get(raw(parts), tmp_path, timeout_s=0.5)
    assert 0.2 < time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_gets_no_more_than_its_time(raw, tmp_path):
    started = time.monotonic()
    with pytest.raises(TransientError):
        get(raw(lambda: iter([time.sleep(3) or b""])), tmp_path, timeout_s=0.4)
    assert time.monotonic() - started < 2.9  # it would have spoken after 3 s


@pytest.mark.parametrize(
    ("answer", "words"),
    [(HEAD + b"x: " + b"y" * 5_000_000 + b"\r\n\r\n", "does not answer in HTTP"), (HEAD + b"x: y\r\n" * 500_000 + b"\r\n", "does not answer in HTTP"),
     (b"SSH-2.0-OpenSSH_9.0\r\n\r\n", "does not answer in HTTP"), (HEAD + b"Content-Length: 99999999999\r\n\r\n", "at most 100000"),
     (HEAD + b"Content-Length: -5\r\n\r\nabc", "does not answer in HTTP"), (b"HTTP/1.1 204 No Content\r\n\r\n", "answered 204"),
     (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "answered 401")],
    ids=["a huge header", "many headers", "another protocol", "a huge length", "a negative length", "nothing", "a login"],
)  # fmt: skip
def test_odd_answers_are_refused(raw, tmp_path, quick, answer, words):
    with pytest.raises(InputError, match=words):
        get(raw(lambda: [answer]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_unpacked(raw, tmp_path, quick):
    """Plain bytes are asked for; a server that packs them all the same gets them stored as they are."""
    packed = zlib.compress(bytes(50_000_000), 9, 31)
    answer = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed
    found = get(raw(lambda: [answer]), tmp_path)
    assert found.read_bytes() == packed


def test_a_redirect_without_end(raw, tmp_path, quick):
    count = iter(range(1000))
    with pytest.raises(InputError, match="redirects more than 3 times"):
        get(raw(lambda: [redirect(f"/{next(count)}")]), tmp_path)
    assert next(count) == net.MAX_REDIRECTS + 1
