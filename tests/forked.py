"""The program for shell scripts: a `flexmerge` whose runs are forked from one process that has imported torch already.

Starting Python and importing torch takes seconds for each command of a script. Here a small client sends its arguments,
folder, environment and descriptors to a server, passes signals on, and exits with the code of the run.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from flexmerge_cli.cli.app import run

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    said = server.makefile()
    pid = int(said.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: os.kill(pid, number))
    sys.exit(int(said.readline() or 1))
"""


@contextlib.contextmanager
def forked_program(folder: Path) -> Iterator[None]:
    """Make `flexmerge`, and `python` as it is, in a new folder, for scripts that find them by PATH while this lasts."""
    folder.mkdir(parents=True)
    place = os.path.relpath(folder / "socket")  # paths of sockets are short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        server = os.fork()
        if server == 0:
            try:
                _serve(listening)
            finally:
                os._exit(1)
    client = CLIENT.format(python=sys.executable, path=str(folder / "socket"))
    for name, text in {"flexmerge": client, "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    try:
        yield
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def _serve(listening: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended runs are not waited for
    while True:
        client, _ = listening.accept()
        if os.fork() == 0:
            code = 1
            try:
                code = _run(client)
            except BaseException:
                traceback.print_exc()
            finally:
                client.sendall(f"{code}\n".encode())
                os._exit(code)
        client.close()


def _run(client: socket.socket) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, descriptors, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as file:
        arguments, folder, environment = json.load(file)
    client.sendall(f"{os.getpid()}\n".encode())
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    code = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    return code
