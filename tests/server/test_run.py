"""`flexmerge serve` as a program: what it prints, how it stops, and what it refuses before it answers anything."""

import json
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from flexmerge_cli.server import run
from flexmerge_cli.server.generation import Choice
from flexmerge_cli.server.tasks import Texts

from ..program import Child, fails


class Served:
    """A server in a process of its own."""

    def __init__(
        self, bundle: Path, folder: Path, *arguments: object, slow: float = 0, grace: float = run.GRACE_SECONDS
    ) -> None:
        """slow: seconds that each batch and each token takes longer. grace: what GRACE_SECONDS is."""

        def before() -> None:
            sys.stdout = (folder / "out").open("w", buffering=1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ignored, where the tests run in background
            answers, take = Texts.answers, Choice.take
            if slow:
                Texts.answers = lambda *given: (time.sleep(slow), answers(*given))[1]
                Choice.take = lambda *given, **more: (time.sleep(slow), take(*given, **more))[1]
            run.GRACE_SECONDS = grace

        self.child = Child("serve", bundle, "--port", 0, "--json", *arguments, before=before)
        out = folder / "out"
        while self.child.is_running() and not (out.exists() and out.read_text().endswith("}\n")):
            time.sleep(0.01)
        assert self.child.is_running(), self.child.wait()
        self.told = json.loads(out.read_text())
        self.url = self.told["url"]

    def predict(self, task: str, inputs: list, **more) -> httpx2.Response:
        return httpx2.post(f"{self.url}/v1/tasks/{task}/predict", json={"inputs": inputs}, timeout=30, **more)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_tells_where_it_is_and_finishes_what_runs_when_it_is_stopped(bundle_of, tmp_path, number):
    server = Served(bundle_of("texts"), tmp_path, "--weights", "packed", slow=0.5)
    assert server.url.startswith("http://127.0.0.1:")
    assert server.told["tasks"] == {
        "grade": "regression", "three": "text-classification", "two": "text-classification"
    }  # fmt: skip
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.predict("two", ["red"])))
    thread.start()
    while not answers and httpx2.get(f"{server.url}/health").json()["waiting"]:
        pass
    time.sleep(0.2)
    server.child.send(number)
    thread.join()
    assert answers[0].status_code == 200
    code, printed = server.child.wait()
    assert (code, printed) == (0, "stopped\n")
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health")


@pytest.mark.parametrize("grace", [30, 0.2])
def test_a_stream_that_runs_when_the_server_is_stopped_is_ended_as_one(bundle_of, tmp_path, grace):
    """Whole within the time that requests have; then with an event that says why, and never in the midst of one."""
    server = Served(bundle_of("gpt2"), tmp_path, slow=0.1, grace=grace)
    body = {"model": "first", "prompt": [5, 6], "max_tokens": 16, "temperature": 0, "stream": True}
    sent = []
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
        for line in answer.iter_lines():
            if line and not sent:
                server.child.send(signal.SIGTERM)
            sent += [line.removeprefix("data: ")] if line else []
    last = json.loads(sent[-2] if grace == 30 else sent[-1])
    if grace == 30:
        assert sent[-1] == "[DONE]" and last["choices"][0]["finish_reason"] in ("length", "stop")
    else:
        assert last["error"]["code"] == "stopping"
    assert server.child.wait() == (0, "stopped\n")


def test_inputs_of_a_client_that_goes_away_are_not_computed(bundle_of, tmp_path):
    server = Served(bundle_of("texts"), tmp_path, "--max-batch", 1, "--max-wait", 0, slow=0.1)
    body = json.dumps({"inputs": ["red"] * 30}).encode()
    head = "POST /v1/tasks/two/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    for sent, is_whole in ((body, True), (body[:9], False)):
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
            client.sendall(f"{head}{len(body)}\r\n\r\n".encode() + sent)
            while is_whole and not httpx2.get(f"{server.url}/health").json()["waiting"]:
                pass
    while httpx2.get(f"{server.url}/health").json()["waiting"]:
        time.sleep(0.01)
    lines = dict(
        line.rsplit(" ", 1) for line in httpx2.get(f"{server.url}/metrics").text.splitlines() if line[0] != "#"
    )
    assert float(lines['flexmerge_inputs_total{task="two"}']) < 10
    assert lines['flexmerge_requests_total{route="/v1/tasks/{name}/predict",status="499"}'] == "1.0"
    assert lines['flexmerge_requests_total{route="other",status="499"}'] == "1.0"
    server.child.send(signal.SIGTERM)
    assert server.child.wait()[0] == 0


def test_a_port_that_is_in_use_is_told_before_anything_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fails(1, "serve", tmp_path / "none", "--port", port, says=(f"127.0.0.1:{port}", "--port 0"))


def test_what_cannot_be_served_is_told_before_anything_is_answered(bundle_of, tmp_path):
    bundle = bundle_of("texts")
    serve = ("serve", bundle, "--port", 0)
    fails(2, *serve, "--host", "no.such.host.invalid", says="--host no.such.host.invalid: Name or service not known")
    fails(1, *serve, "--host", "192.0.2.1", says=("192.0.2.1:0: Cannot assign requested address", "--host"))
    fails(2, *serve, "--max-wait", "inf", says="60000")
    fails(4, *serve, "--tasks", "four", says=("no task `four`", "two"))
    fails(2, *serve, "--weights", "sparse", says="weights `sparse` is neither `dense` nor `packed`")
    fails(2, *serve, "--max-memory", "1KB", says=("the weights of 3 tasks take", "or --weights packed"))
    fails(2, *serve, "--max-body", "much", says="`much`")
    fails(4, "serve", tmp_path / "none", "--port", 0)
    fails(4, "serve", "hf://no/bundle", "--port", 0)
    other = tmp_path / "bundle"
    shutil.copytree(bundle, other, symlinks=True)
    config = json.loads((other / "tasks/two/config.json").read_text())
    (other / "tasks/two/config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    fails(5, "serve", other, "--port", 0, says="tasks/two/config.json")


def test_a_damaged_bundle_is_not_served_but_its_sound_tasks_may_be(bundle_of, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_of("texts"), bundle, symlinks=True)
    manifest = json.loads((bundle / "manifest.json").read_text())
    name = next(
        name for name, file in manifest["files"].items() if name.startswith("weights/") and file["tasks"] == ["two"]
    )
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).write_bytes(data)
    fails(5, "serve", bundle, "--port", 0, says=name)
    server = Served(bundle, tmp_path, "--tasks", "three", "grade")
    assert list(server.told["tasks"]) == ["three", "grade"]
    assert server.predict("grade", ["red"]).status_code == 200
    assert server.predict("two", ["red"]).status_code == 404
    server.child.send(signal.SIGTERM)
    assert server.child.wait()[0] == 0


def test_without_the_extra_the_command_that_installs_it_is_told(bundle_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    fails(2, "serve", bundle_of("texts"), says=("uvicorn is not installed", "pip install 'flexmerge-cli[serve]'"))
