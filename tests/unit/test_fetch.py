"""Inputs from addresses: what is refused, and that what is allowed arrives whole."""

import hashlib
import http.server
import threading

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
