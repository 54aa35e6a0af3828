"""A soak of `flexmerge serve`: many connections at once, eight tasks, whole and streamed, malformed ones between.

Every answer is compared with the offline one, memory is watched meanwhile, and at the end the server is stopped while
it answers. Run it: python -m tests.soak
"""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from .evaluation.tiny import sentences
from .server.bundles import mixed
from .server.offline import Offline

HEADERS = {"Content-Type": "application/json"}
LANGUAGES, HEADS = ("code", "prose", "verse", "talk"), ("mood", "topic", "tone", "grade")
PROMPTS = sentences(12, seed=11)
TEXTS = sentences(40, seed=12)
MALFORMED: tuple[tuple[int, str, bytes], ...] = (
    (400, "/v1/completions", b'{"model": "code"'),
    (400, "/v1/completions", b'{"model": "code", "prompt": "red", "temperature": NaN}'),
    (400, "/v1/completions", b'{"model": "code", "prompt": "red", "max_tokens": 100000}'),
    (400, "/v1/completions", b'{"model": "mood", "prompt": "red"}'),
    (400, "/v1/completions", b'{"model": "code", "prompt": [1, 9999]}'),
    (404, "/v1/completions", b'{"model": "nobody", "prompt": "red"}'),
    (400, "/v1/chat/completions", b'{"model": "talk", "messages": "red"}'),
    (400, "/v1/tasks/mood/predict", b'{"inputs": ["\\ud800"]}'),
    (400, "/v1/tasks/mood/predict", b'{"inputs": [1]}'),
    (400, "/v1/tasks/mood/predict", b"[" * 5000),
    (404, "/v1/tasks/nobody/predict", b'{"inputs": ["red"]}'),
    (413, "/v1/tasks/mood/predict", b'{"inputs": ["' + b"red " * 30_000 + b'"]}'),
    (404, "/v1/nothing", b"{}"),
)

Ask = Callable[[httpx2.Client], bool]
"""Sends one request, and says whether the answer was right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaked:
    """What came of it."""

    wrong: int
    """Answers that were not the offline one, and malformed requests that were not refused as they should be."""
    counted: int
    """Requests by the server's own metrics."""
    memory: list[int]
    """Bytes resident in the process, after each quarter of the requests."""
    tensors: set[float]
    """What the server said of the bytes of its tensors."""
    mean_batch: float
    seconds: float
    code: int
    """The server's exit code."""
    unanswered: int
    """Requests that were accepted before the stop and not answered."""


def soak(bundle: Path, count: int, *, connections: int = 16, seed: int = 0) -> Soaked:
    """count: requests; each connection sends one after the other."""
    with _server(bundle) as (process, url):
        asked = _requests(bundle, count, url, random.Random(seed))
        memory, tensors, wrong, begun = [], set(), 0, time.monotonic()
        with ThreadPoolExecutor(connections) as pool:
            for part in range(4):
                with httpx2.Client(
                    base_url=url, timeout=120, limits=httpx2.Limits(max_connections=connections)
                ) as client:
                    quarter = asked[count * part // 4 : count * (part + 1) // 4]
                    wrong += list(pool.map(lambda ask, client=client: ask(client), quarter)).count(False)
                    told = client.get("/metrics").text
                memory.append(int(_metric(told, "process_resident_memory_bytes")))
                tensors.add(_metric(told, "flexmerge_resident_bytes"))
            seconds = time.monotonic() - begun
            last = [pool.submit(_answered, url, prompt) for prompt in PROMPTS]
            _wait_for(url, _completions(told) + len(last))
            process.send_signal(signal.SIGTERM)
            unanswered = [one.result() for one in last].count(False)
        code = process.wait(60)
    return Soaked(
        wrong=wrong,
        counted=int(_metric(told, "flexmerge_requests_total")),
        memory=memory,
        tensors=tensors,
        mean_batch=_metric(told, "flexmerge_batch_inputs_sum") / _metric(told, "flexmerge_batch_inputs_count"),
        seconds=seconds,
        code=code,
        unanswered=unanswered,
    )


@contextmanager
def _server(bundle: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    command = [
        sys.executable,
        "-m",
        "flexmerge_cli",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--json",
        "--max-body",
        "64kB",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = ""
            while not said.endswith("}\n}\n"):
                line = process.stdout.readline()
                assert line, f"the server ended: {process.wait()}"
                said += line
            yield process, json.loads(said)["url"]
        finally:
            process.kill()


def _requests(bundle: Path, count: int, url: str, rng: random.Random) -> list[Ask]:
    """Their answers are known before the first is sent."""
    offline = {task: Offline(bundle, task) for task in (*LANGUAGES, *HEADS)}

    @cache
    def greedy(task: str, prompt: str, max_tokens: int) -> tuple[str, int, str]:
        return offline[task].completion(prompt, max_tokens)

    @cache
    def drawn(task: str, prompt: str, seed: int) -> str:
        return offline[task].drawn(prompt, 8, seed, 1.5, 0.9)

    @cache
    def logits(task: str, text: str) -> np.ndarray:
        return offline[task].logits(text).numpy()

    def one() -> Ask:
        kind, task, prompt = rng.random(), rng.choice(LANGUAGES), rng.choice(PROMPTS)
        if kind < 0.2:
            return _malformed(*rng.choice(MALFORMED))
        if kind < 0.25:
            return _abandoned(url, task, prompt)
        if kind < 0.4:
            seed = rng.randrange(3)
            asked = {"temperature": 1.5, "top_p": 0.9, "seed": seed, "max_tokens": 8}
            return _completion(task, prompt, asked, drawn(task, prompt, seed))
        if kind < 0.6:
            max_tokens = rng.randrange(1, 15)
            asked = {"temperature": 0, "max_tokens": max_tokens, "stream": rng.random() < 0.5}
            return _completion(task, prompt, asked, greedy(task, prompt, max_tokens)[0])
        head, texts = rng.choice(HEADS), rng.sample(TEXTS, rng.randrange(1, 5))
        return _prediction(head, texts, [logits(head, text) for text in texts])

    return [one() for _ in range(count)]


def _malformed(status: int, path: str, body: bytes) -> Ask:
    def ask(client: httpx2.Client) -> bool:
        answer = client.post(path, content=body, headers=HEADERS)
        return answer.status_code == status and "message" in answer.json()["error"]

    return ask


def _abandoned(url: str, task: str, prompt: str) -> Ask:
    """A client that goes away in the middle of a stream, or of its own request."""

    def ask(_client: httpx2.Client) -> bool:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"model": task, "prompt": prompt, "stream": True, "max_tokens": 10}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        for length, reads in ((len(body), True), (len(body) + 9, False)):
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.sendall(head.encode() + f"Content-Length: {length}\r\n\r\n".encode() + body)
                if reads and not connection.recv(20).startswith(b"HTTP/1.1 200"):
                    return False
        return True

    return ask


def _completion(task: str, prompt: str, asked: dict[str, Any], expected: str) -> Ask:
    def ask(client: httpx2.Client) -> bool:
        answer = client.post("/v1/completions", json={"model": task, "prompt": prompt, **asked})
        if not asked.get("stream"):
            return answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected
        *events, last, _ = answer.text.split("\n\n")
        pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
        return last == "data: [DONE]" and "".join(pieces) == expected

    return ask


def _prediction(task: str, texts: list[str], expected: list[np.ndarray]) -> Ask:
    def ask(client: httpx2.Client) -> bool:
        answer = client.post(f"/v1/tasks/{task}/predict", json={"inputs": texts})
        if answer.status_code != 200 or len(answer.json()["outputs"]) != len(texts):
            return False
        for output, logits in zip(answer.json()["outputs"], expected):
            found = output["value"] if task == "grade" else output["scores"]
            known = (
                logits[0] if task == "grade" else np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            )
            if not np.allclose(found, known, rtol=0, atol=1e-5):
                return False
        return True

    return ask


def _answered(url: str, prompt: str) -> bool:
    """Whether a request that was accepted is answered; one that comes too late is not accepted."""
    try:
        answer = httpx2.post(
            f"{url}/v1/completions", json={"model": "code", "prompt": prompt, "max_tokens": 12}, timeout=60
        )
    except httpx2.ConnectError:
        return True
    return answer.status_code in (200, 503)


def _completions(told: str) -> float:
    return _metric(told, "flexmerge_requests_total", route="/v1/completions")


def _wait_for(url: str, count: float) -> None:
    """Return once the server has begun so many completions, by its metrics."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        told = httpx2.get(f"{url}/metrics", timeout=60).text
        if _completions(told) + _metric(told, "flexmerge_requests_in_progress") - 1 >= count:  # 1 is this one
            return
        time.sleep(0.01)
    raise TimeoutError(f"the server has not begun {count:g} completions")


def _metric(text: str, name: str, route: str = "") -> float:
    """Added over its labels, or over those of a route."""
    labels = rf'{{[^}}]*route="{route}"[^}}]*}}' if route else "(?:{.*})?"
    return sum(map(float, re.findall(rf"^{name}{labels} (.*)$", text, re.MULTILINE)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(soak(mixed(Path(folder)), int((sys.argv[1:] or ["2000"])[0])))
