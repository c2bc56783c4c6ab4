"""The gate in front of a stand-in for the SuperLink: what passes, what is refused, and whose word is taken."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench.hosts import Federation, free_port, rows_of, wait_until
from tests.deploy.conftest import SMALL

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
MIB = 2**20
NOBODY = 65534
LIMIT_S = 30.0

pytestmark = [
    pytest.mark.skipif(
        shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin") is None,
        reason="nginx is not installed",
    ),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="another user than root is found on Linux"),
]


@dataclass
class StandIn:
    """A server with the SuperLink's certificate that notes what it is asked.

    Attributes
    ----------
    seen : (path, bytes of the body) of every request.
    held : while it is not set, requests below ``/v1/fleet/hold`` are not answered.
    """

    port: int = 0
    seen: list[tuple[str, int]] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)

    def start(self, certificates: Path) -> ThreadingHTTPServer:
        """Serve in threads until it is shut down."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.seen.append((self.path, len(body)))
                if self.path.startswith("/v1/fleet/hold"):
                    outer.held.wait(LIMIT_S)
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        server = Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where another user than root finds what it needs: the folders of tests are closed to it."""
    made = Path(tempfile.mkdtemp(prefix="prunus-gate-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def certificates_in(folder: Path) -> Path:
    subprocess.run([DEPLOY / "certificates.sh", folder, "localhost"], check=True, capture_output=True)
    if os.geteuid() == 0:
        os.chown(folder / "server.key", NOBODY, -1)
    return folder


@pytest.fixture(scope="module")
def certificates(folder) -> Path:
    return certificates_in(folder / "etc" / "certificates")


@pytest.fixture(scope="module")
def superlink(certificates) -> Iterator[StandIn]:
    stand_in = StandIn()
    server = stand_in.start(certificates)
    yield stand_in
    stand_in.held.set()
    server.shutdown()
    server.server_close()


class Gate:
    """``gate.sh``, run by a user who is not root."""

    def __init__(self, folder: Path, name: str, certificates: Path, superlink_port: int, **settings: str) -> None:
        self.state, self.port, self.trusted = folder / name, free_port(), certificates / "ca.crt"
        self.state.mkdir(mode=0o700)
        user = {}
        if os.geteuid() == 0:
            os.chown(self.state, NOBODY, NOBODY)
            user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        own = {
            "PATH": os.environ["PATH"],
            "PRUNUS_STATE": str(self.state),
            "PRUNUS_CERTIFICATES": str(certificates),
            "PRUNUS_GATE": f"127.0.0.1:{self.port}",
            "PRUNUS_PORT": str(superlink_port),
        }
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(["bash", DEPLOY / "gate.sh"], cwd="/", env=own | settings, stderr=log, **user)
        deadline = time.monotonic() + LIMIT_S
        while self.popen.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.02)
        self.stop()
        raise AssertionError(f"the gate did not start: {self.log.read_text()}")

    def open(self) -> http.client.HTTPSConnection:
        """A device's connection."""
        context = ssl.create_default_context(cafile=str(self.trusted))
        return http.client.HTTPSConnection("localhost", self.port, timeout=LIMIT_S, context=context)

    def ask(self, path: str, body: bytes = b"", method: str = "POST") -> int:
        """Status code of one request on a connection of its own."""
        connection = self.open()
        try:
            connection.request(method, path, body=body)
            return connection.getresponse().status
        finally:
            connection.close()

    def stop(self) -> None:
        """End it, its workers first."""
        self.popen.terminate()
        self.popen.wait(timeout=LIMIT_S)


@pytest.fixture(scope="module")
def gate(folder, certificates, superlink) -> Iterator[Gate]:
    if os.geteuid() == 0 and not os.stat(DEPLOY / "gate.sh").st_mode & 0o004:
        pytest.skip("another user cannot read this checkout")
    started = Gate(folder, "state", certificates, superlink.port)
    yield started
    started.stop()


def test_what_a_device_sends_passes_both_ways_whole(gate, superlink):
    """Of Flower's chunk size, too: larger than what nginx holds in memory, so that its folders must be its own."""
    connection = gate.open()
    for size in (0, 100, 5 * MIB + 2000):
        body = os.urandom(size)
        connection.request("POST", "/v1/fleet/push-object", body=body)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, body)
        assert superlink.seen[-1] == ("/v1/fleet/push-object", size)
    connection.close()


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/pull-messages",
        "/v1/fleets/x",
        "/V1/FLEET/x",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet/x/../../control/start-run",
        "//v1/control/start-run",
        "/v1//control/start-run",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
def test_nothing_but_the_fleet_interface_is_reached(path, gate, superlink):
    before = len(superlink.seen)
    assert {gate.ask(path, method=method) for method in ("GET", "POST")} == {403}
    assert len(superlink.seen) == before


def test_a_request_beyond_the_bound_is_refused_unread(gate, superlink):
    before = len(superlink.seen)
    connection = gate.open()
    connection.putrequest("POST", "/v1/fleet/push-object")
    connection.putheader("Content-Length", str(8 * MIB + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert len(superlink.seen) == before


def test_a_server_with_another_authority_is_no_superlink(folder, gate, superlink):
    """Who sits on the SuperLink's port without its certificate gets nothing that devices send."""
    stranger = StandIn()
    server = stranger.start(certificates_in(folder / "stranger"))
    other = Gate(folder, "astray", gate.trusted.parent, stranger.port)
    try:
        assert other.ask("/v1/fleet/push-object", b"x") == 502
        assert not stranger.seen
    finally:
        other.stop()
        server.shutdown()
        server.server_close()


@contextmanager
def held_requests(gate, superlink, number: int) -> Iterator[list[http.client.HTTPSConnection]]:
    """``number`` requests at once that have come through the gate, or as many as it lets; answered when let go."""
    superlink.held.clear()
    before = len(superlink.seen)
    connections = [gate.open() for _ in range(number)]
    try:
        for connection in connections:
            connection.request("POST", "/v1/fleet/hold")
        deadline = time.monotonic() + LIMIT_S
        while len(superlink.seen) < before + number and time.monotonic() < deadline:
            time.sleep(0.01)
        yield connections
    finally:
        superlink.held.set()
        for connection in connections:
            connection.close()


def test_what_one_address_may_ask_at_a_time_follows_the_number_of_its_devices(folder, certificates, superlink):
    """Four requests for each device; who is beyond is told to come again, which Flower does."""
    small = Gate(folder, "small", certificates, superlink.port, PRUNUS_GATE_DEVICES="1")
    try:
        with held_requests(small, superlink, 4) as waiting:
            assert small.ask("/v1/fleet/pull-messages") == 503
            superlink.held.set()
            assert [connection.getresponse().status for connection in waiting] == [200] * 4
    finally:
        small.stop()


def test_by_default_the_devices_of_one_router_are_served_at_once(gate, superlink):
    """As when all of them send what they trained: seventy requests that take their time."""
    with held_requests(gate, superlink, 70) as connections:
        superlink.held.set()
        assert {connection.getresponse().status for connection in connections} == {200}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is needed to make keys")
def test_a_run_goes_through_the_gate_and_a_revoked_device_is_out_at_once(folder, tmp_path):
    """Real processes; after the revocation nothing is restarted, and the other device stays."""
    with Federation(tmp_path / "f", 0, is_secure=True, poll_s=0.5) as federation:
        copied = folder / "federation"
        copied.mkdir()
        for name in ("ca.crt", "server.pem", "server.key"):
            shutil.copy(federation.folder / "certificates" / name, copied / name)
        if os.geteuid() == 0:
            os.chown(copied / "server.key", NOBODY, -1)
        gate = Gate(folder, "between", copied, federation.port)
        try:
            for i in range(2):
                federation.start_node(f"n{i}", i, PRUNUS_SUPERLINK=f"localhost:{gate.port}")
            run_dir = tmp_path / "run"
            run = federation.submit(run_dir, "strategy=fedavg", "num-rounds=1", *SMALL)
            assert run.popen.wait(timeout=600) == 0, run.text()
            assert [row["num_merged"] for row in rows_of(run_dir) if row["event"] == "merge"] == [2]
            federation.script("node-key.sh", "revoke", str(federation.node_id("n1")))
            wait_until(lambda: not federation.nodes["n1"].is_alive, 60, "the end of the revoked device's process")
            assert federation.nodes["n0"].is_alive
        finally:
            gate.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused")
def test_the_gate_is_not_roots(certificates, tmp_path):
    done = subprocess.run(
        [DEPLOY / "gate.sh"],
        env={"PATH": os.environ["PATH"], "PRUNUS_STATE": str(tmp_path), "PRUNUS_CERTIFICATES": str(certificates)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "not as root" in done.stderr
