"""JupyterLab as `make lab` starts it, for tests."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import websocket

from sparsity_utils import paths

START = 30  # seconds that the server, or a cell, may take at most; together they take about three


class Server:
    """A running JupyterLab: its REST interface and the channel of a kernel."""

    def __init__(self, port: int):
        self.address, self.token = f"127.0.0.1:{port}", secrets.token_hex(16)

    def ask(self, method: str, path: str, **content: Any) -> Any:
        """One request; the decoded JSON of the answer."""
        data = json.dumps(content).encode() if content else None
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"http://{self.address}/api/{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=START) as answer:
            return json.loads(answer.read() or "null")

    def execute(self, kernel: str, source: str) -> tuple[str, str]:
        """Run `source` in a kernel as JupyterLab does; return the status of its reply and what it printed."""
        identity = uuid.uuid4().hex
        header = {
            "msg_id": identity,
            "msg_type": "execute_request",
            "session": identity,
            "username": "",
            "version": "5.3",
        }
        request = {"header": header, "parent_header": {}, "metadata": {}, "channel": "shell", "buffers": []}
        request["content"] = {"code": source, "silent": False, "store_history": True, "allow_stdin": False}
        url = f"ws://{self.address}/api/kernels/{kernel}/channels?token={self.token}"
        status, printed, idle = "", "", False
        with closing(websocket.create_connection(url, timeout=START)) as channel:
            channel.send(json.dumps(request))
            while not (status and idle):
                message = json.loads(channel.recv())
                if message["parent_header"].get("msg_id") != identity:
                    continue
                content = message["content"]
                if message["msg_type"] == "execute_reply":
                    status = content["status"]
                elif message["msg_type"] == "stream":
                    printed += content["text"]
                elif message["msg_type"] == "status":
                    idle = content["execution_state"] == "idle"
        return status, printed


@contextmanager
def running_lab(folder: Path, *without: str) -> Iterator[Server]:
    """`make lab` with this Python and no browser, its home in `folder`, environment variables in `without` unset."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        lab = Server(free.getsockname()[1])
    port = lab.address.split(":")[1]
    options = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0"
    homes = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    dropped = ("MAKE", *without)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    environment |= homes | {"JUPYTER_TOKEN": lab.token, "IPYTHONDIR": str(folder / "ipython")}
    command = ["make", "lab", f"PY={sys.executable}", "ENV=", f"LAB={options}"]
    log = folder / "lab.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=paths.ROOT, env=environment, stdout=file, stderr=file)
    try:
        _wait(lab, process, log)
        yield lab
        lab.ask("POST", "shutdown")
        process.wait(timeout=START)
    finally:
        process.kill()


def _wait(lab: Server, process: subprocess.Popen, log: Path) -> None:
    """Return when the server answers."""
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            lab.ask("GET", "status")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not come up:\n{log.read_text()}")
