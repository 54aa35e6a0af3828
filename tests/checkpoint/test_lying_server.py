"""A web server that sends more than was asked for, or slowly, or nothing: what is read of it ends, in exit 4."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flexmerge_cli.checkpoint import ranges, urls, web_answers

from ..families import plain, write_checkpoint
from ..program import fails, succeeds

pytest.importorskip("aiohttp")


class Liar(BaseHTTPRequestHandler):
    """Serves one checkpoint. The files in `server.lies` are answered by what is given there."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        data = self.server.files.get(self.path.removeprefix("/"))
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()

    def do_GET(self):
        name = self.path.removeprefix("/")
        data = self.server.files.get(name)
        if name in self.server.lies:
            return self.server.lies[name](self)
        if data is None:
            return self.do_HEAD()
        asked = self.headers.get("Range")
        if asked is not None:
            start, stop = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            data = data[start : stop + 1]
        self.begin(206 if asked else 200, len(data))
        return self.wfile.write(data)

    def begin(self, status, length):
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def pour(self, chunk, pause=0.0):
        """Send without end, until nobody listens."""
        self.begin(self.server.status, 1 << 40)
        try:
            while not self.server.ended.is_set():
                self.wfile.write(chunk)
                self.server.sent += len(chunk)
                self.server.ended.wait(pause)
        except OSError:
            self.close_connection = True


def everything(answer):
    answer.pour(b"\0" * 65536)


def a_trickle(answer):
    answer.pour(b"\0", pause=0.1)


def nothing(answer):
    answer.server.ended.wait(20)
    answer.close_connection = True


@pytest.fixture
def server(tmp_path):
    write_checkpoint(tmp_path / "made", plain(num_tasks=1).base)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    server.files["config.json"] = b"{}" + 30 * b" "
    server.lies, server.sent, server.status, server.ended = {}, 0, 200, threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


# What lies between a server's calls and a reader's: the buffers of both ends of the connection.
IN_TRANSIT = 16 << 20


def test_a_server_that_is_honest_is_read(server):
    assert succeeds("inspect", server.address, "--json").json["parameters"] > 0


@pytest.mark.parametrize("status", [200, 206])
def test_no_more_is_read_than_was_asked_for(status, server):
    server.status, server.lies = status, {"model.safetensors": everything}
    fails(4, "inspect", server.address, says="does not answer requests for a range: 8 bytes were asked for, more came")
    assert server.sent < IN_TRANSIT


def test_a_file_beside_the_weights_has_an_end(server):
    server.lies = {"config.json": everything}
    fails(4, "inspect", server.address, says="more came")
    assert server.sent < IN_TRANSIT


def test_a_listing_has_an_end(server, monkeypatch):
    monkeypatch.setattr(web_answers, "MAX_PAGE_BYTES", 100_000)
    server.lies = {"": everything}
    fails(4, "inspect", server.address, says="a page of more than 100,000 bytes")
    assert server.sent < IN_TRANSIT


@pytest.mark.parametrize("lie", [a_trickle, nothing])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", ""])
def test_what_is_slow_or_silent_is_given_up(name, lie, server, monkeypatch):
    monkeypatch.setattr(ranges, "SLOW_SECONDS", 0.3)
    monkeypatch.setattr(urls, "LISTING_SECONDS", 0.3)
    monkeypatch.setattr(ranges, "SLOW_BYTES_PER_SECOND", 10**9)
    server.status, server.lies = 206, {name: lie}
    begun = time.monotonic()
    fails(4, "inspect", server.address, says="sends too slowly" if name else "Timeout")
    assert time.monotonic() - begun < 5
