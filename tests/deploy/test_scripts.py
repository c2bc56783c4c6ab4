"""The scripts of deploy/ refuse what is insecure or cannot work, before anything is started."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import yaml

from bench.hosts import free_port
from server_app.launch import LaunchError
from server_app.submit import main, read

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PRUNUS_", "FLWR_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
    return subprocess.run(
        [str(DEPLOY / name), *arguments],
        env=clean | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    folder = tmp_path / "certificates"
    done = script("certificates.sh", str(folder), "localhost", "127.0.0.1", "::1")
    assert done.returncode == 0, done.stderr
    return folder


def is_trusted(folder: Path) -> bool:
    command = [
        "openssl",
        "verify",
        "-CAfile",
        folder / "ca.crt",
        "-verify_hostname",
        "localhost",
        folder / "server.pem",
    ]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@needs_openssl
def test_certificates_are_trusted_for_every_name_that_was_given_and_keys_are_private(certificates):
    assert is_trusted(certificates)
    text = subprocess.run(
        ["openssl", "x509", "-in", certificates / "server.pem", "-noout", "-text"], capture_output=True, text=True
    ).stdout
    for name in ("DNS:localhost", "IP Address:127.0.0.1", "IP Address:0:0:0:0:0:0:0:1", "CA:FALSE"):
        assert name in text
    assert all((certificates / name).stat().st_mode & 0o077 == 0 for name in ("ca.key", "server.key"))


@needs_openssl
def test_renewing_changes_the_servers_certificate_and_nothing_on_the_devices(certificates):
    before = [(certificates / name).read_bytes() for name in ("ca.crt", "server.pem", "server.key")]
    assert script("certificates.sh", str(certificates), "localhost").returncode == 0
    after = [(certificates / name).read_bytes() for name in ("ca.crt", "server.pem", "server.key")]
    assert [b == a for b, a in zip(before, after, strict=True)] == [True, False, False]
    assert is_trusted(certificates)


@needs_openssl
def test_the_authority_is_rotated_without_a_moment_in_which_a_device_trusts_nobody(certificates):
    folder = str(certificates)
    old = (certificates / "ca.crt").read_text()
    assert script("certificates.sh", "--new-ca", folder).returncode == 0
    assert old in (certificates / "ca.crt").read_text()
    assert is_trusted(certificates)  # the old server, the new bundle
    early = script("certificates.sh", "--drop-old-ca", folder)
    assert early.returncode == 2
    assert "renew it first" in early.stderr
    assert script("certificates.sh", folder, "localhost").returncode == 0
    assert is_trusted(certificates)  # the new server, the same bundle
    assert script("certificates.sh", "--drop-old-ca", folder).returncode == 0
    assert old not in (certificates / "ca.crt").read_text()
    assert is_trusted(certificates)


@pytest.mark.parametrize("host", ["a;rm -rf", "x,DNS:evil", "$(id)", "a b"])
def test_a_host_that_is_no_name_is_refused(host, tmp_path):
    done = script("certificates.sh", str(tmp_path / "c"), host)
    assert done.returncode == 2
    assert "neither a name nor an address" in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org", "127.0.0.1.example.org", "localhost.lan"])
def test_the_insecure_flag_is_for_loopback_only(host, tmp_path):
    link = script("superlink.sh", "--insecure-loopback", PRUNUS_STATE=str(tmp_path), PRUNUS_HOST=host)
    node = script(
        "supernode.sh",
        "--insecure-loopback",
        PRUNUS_STATE=str(tmp_path),
        PRUNUS_PARTITION="0",
        PRUNUS_SUPERLINK=f"{host}:8000",
    )
    operator = script("connect.sh", f"{host}:8000", "--insecure-loopback", FLWR_HOME=str(tmp_path))
    for done in (link, node, operator):
        assert done.returncode == 2
        assert "is not this machine" in done.stderr


def test_without_the_flag_there_is_no_superlink_without_certificates(tmp_path):
    done = script("superlink.sh", PRUNUS_STATE=str(tmp_path))
    assert done.returncode == 2
    assert "the folder that certificates.sh makes" in done.stderr


NODE = {"PRUNUS_SUPERLINK": "127.0.0.1:1", "PRUNUS_PARTITION": "0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PRUNUS_SUPERLINK": ""}, "PRUNUS_SUPERLINK is not set"),
        ({"PRUNUS_PARTITION": "-1"}, "expected a number from 0"),
        ({"PRUNUS_PARTITION": "0 x=1"}, "expected a number from 0"),
        ({"PRUNUS_STATE": ""}, "PRUNUS_STATE is not set"),
        ({"PRUNUS_MEMORY_BYTES": "1GB"}, "expected bytes"),
        ({"PRUNUS_DATA": "/nowhere"}, "cannot read /nowhere"),
        ({"PRUNUS_PRELOAD": "1"}, "expected yes or no"),
        ({}, "the ca.crt that certificates.sh made"),
    ],
)
def test_a_node_with_a_wrong_setting_says_which_and_starts_nothing(changes, message, tmp_path):
    done = script("supernode.sh", **({"PRUNUS_STATE": str(tmp_path)} | NODE | changes))
    assert done.returncode == 2
    assert message in done.stderr


@needs_openssl
def test_a_private_key_that_others_can_read_is_refused(certificates, tmp_path):
    key = tmp_path / "key"
    assert script("node-key.sh", "make", str(key)).returncode == 0
    assert key.stat().st_mode & 0o077 == 0
    key.chmod(0o644)
    settings = {
        **NODE,
        "PRUNUS_STATE": str(tmp_path),
        "PRUNUS_CA": str(certificates / "ca.crt"),
        "PRUNUS_KEY": str(key),
    }
    done = script("supernode.sh", **settings)
    assert done.returncode == 2
    assert "can be read by others" in done.stderr
    (certificates / "server.key").chmod(0o640)
    done = script("superlink.sh", PRUNUS_STATE=str(tmp_path), PRUNUS_CERTIFICATES=str(certificates))
    assert done.returncode == 2
    assert "can be read by others" in done.stderr


def test_a_key_is_never_overwritten_and_a_private_key_never_registered(tmp_path):
    key = tmp_path / "key"
    assert script("node-key.sh", "make", str(key)).returncode == 0
    before = key.read_bytes()
    assert script("node-key.sh", "make", str(key)).returncode == 2
    assert key.read_bytes() == before
    done = script("node-key.sh", "register", str(key))
    assert done.returncode == 2
    assert "must not leave its device" in done.stderr
    done = script("node-key.sh", "rotate", str(key))
    assert done.returncode == 0
    assert "revoke the device's old node id" in done.stdout
    assert key.read_bytes() == before


@needs_openssl
def test_a_connection_is_written_once_and_others_are_left_alone(certificates, tmp_path):
    home = tmp_path / "home"
    for _ in range(2):
        done = script("connect.sh", "localhost:8000", str(certificates / "ca.crt"), FLWR_HOME=str(home))
        assert done.returncode == 0, done.stderr
        more = {"FLWR_HOME": str(home), "PRUNUS_CONNECTION": "trial"}
        assert script("connect.sh", "127.0.0.1:8001", "--insecure-loopback", **more).returncode == 0
    found = tomllib.loads((home / "config.toml").read_text())["superlink"]
    assert found["prunus"] == {"address": "localhost:8000", "root-certificates": str(certificates / "ca.crt")}
    assert found["trial"] == {"address": "127.0.0.1:8001", "insecure": True}


@needs_openssl
@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_the_gate_is_a_configuration_that_nginx_accepts(certificates, tmp_path):
    text = (DEPLOY / "nginx.conf").read_text()
    (tmp_path / "state").mkdir()
    for name, value in {
        "STATE": tmp_path / "state",
        "CERTIFICATES": certificates,
        "LISTEN": f"127.0.0.1:{free_port()}",
        "SUPERLINK": "127.0.0.1:1",
        "NAME": "localhost",
        "RATE": 256,
        "BURST": 2560,
        "CONNECTIONS": 256,
    }.items():
        text = text.replace(f"@{name}@", str(value))
    assert "@" not in text.partition("worker_processes")[2]
    (tmp_path / "nginx.conf").write_text(text)
    done = subprocess.run(
        ["nginx", "-t", "-p", tmp_path, "-e", tmp_path / "e", "-c", tmp_path / "nginx.conf"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", sorted(path.name for path in (DEPLOY / "systemd").iterdir()))
def test_systemd_accepts_the_unit(unit, tmp_path):
    text = (DEPLOY / "systemd" / unit).read_text().replace("/opt/prunus/deploy/", f"{DEPLOY}/")
    (tmp_path / unit).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_supernode_may_try_for_longer_than_its_old_registration_counts():
    """A node that was killed is refused for up to 60 s: restarts must be unlimited, and not many in that time."""
    unit = (DEPLOY / "systemd" / "prunus-supernode@.service").read_text()
    assert "Restart=always" in unit
    assert "StartLimitIntervalSec=0" in unit
    assert "RestartSec=15" in unit


def test_the_compose_file_gives_devices_no_way_to_the_superlink_but_the_gate():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert list(services["superlink"]["networks"]) == ["inside"]
    assert "ports" not in services["superlink"]
    for name in ("node0", "node1"):
        assert services[name]["networks"] == ["devices"]
        assert services[name]["environment"]["PRUNUS_SUPERLINK"] == "gate:9443"
    assert not any("insecure" in str(service) for service in services.values())


def test_the_compose_file_hands_no_container_a_key_that_is_not_its_own():
    """Files are mounted one by one: a folder would bring the authority's key, and the devices' private ones."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    mounted = {
        name: {entry.split(":")[0].removeprefix("../") for entry in service["volumes"]} - set(compose["volumes"])
        for name, service in compose["services"].items()
    }
    server = {f"certificates/{name}" for name in ("ca.crt", "server.pem", "server.key")}
    assert mounted["superlink"] == server | {"keys/0.pub", "keys/1.pub"}
    assert mounted["gate"] == server | {"./gate.sh", "./common.sh", "./nginx.conf"}
    assert [mounted[f"node{i}"] for i in range(2)] == [{"certificates/ca.crt", f"keys/{i}"} for i in range(2)]
    everything = [entry for service in compose["services"].values() for entry in service["volumes"]]
    assert all(entry.endswith(":ro") for entry in everything if entry.startswith("."))


def test_the_gate_of_the_compose_file_finds_the_superlink_wherever_it_was_started():
    """nginx looks a name up once: a container that is made anew must have the address of the one before."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    address = compose["services"]["superlink"]["networks"]["inside"]["ipv4_address"]
    assert compose["services"]["gate"]["environment"]["PRUNUS_HOST"] == address
    (pool,) = compose["networks"]["inside"]["ipam"]["config"]
    assert ip_address(address) in ip_network(pool["subnet"])
    assert ip_address(address) not in ip_network(pool["ip_range"])
    assert compose["services"]["gate"]["environment"]["PRUNUS_NAME"] == "superlink"  # of the certificate that is made


def test_who_made_the_keys_is_who_the_containers_run_as():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert compose["services"]["superlink"]["build"]["args"] == {"PRUNUS_UID": compose["services"]["gate"]["user"]}
    assert '--uid "$PRUNUS_UID"' in (DEPLOY / "Dockerfile").read_text()


def test_an_image_gets_what_is_named_and_no_key_certificate_environment_or_history():
    """Everything is left out but folders and files that are the app; what is named must not hold what is private."""
    lines = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    named = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert all((DEPLOY.parent / name).exists() for name in named)
    assert not named & {"certificates", "keys", "data", "results", "bench", "tests", ".git", ".venv", ".flwr", "."}
    last = max(index for index, rule in enumerate(rules) if rule.startswith("!"))
    assert {"**/*.key", "**/*.pem", "deploy/certificates", "deploy/keys"} <= set(rules[last + 1 :])


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_does_not_take_up_keys_that_lie_in_the_checkout():
    places = ["certificates/ca.key", "certificates/server.key", "keys/0", "deploy/certificates/ca.key", "deploy/keys/0"]
    done = subprocess.run(
        ["git", "-c", f"core.excludesFile={os.devnull}", "check-ignore", "--no-index", *places],
        cwd=DEPLOY.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 128:
        pytest.skip("this is no git checkout")
    assert done.stdout.split() == places


def test_who_waits_for_a_superlink_goes_on_when_it_listens_and_gives_up_in_the_end(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = script("connect.sh", address, "--insecure-loopback", "--wait", FLWR_HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
    done = script("connect.sh", address, "--insecure-loopback", "--wait", FLWR_HOME=str(tmp_path), PRUNUS_WAIT_S="0")
    assert done.returncode == 2
    assert f"nothing listens at {address}" in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PRUNUS_GATE_DEVICES": "0"}, "expected a number from 1"),
        ({"PRUNUS_GATE": "0.0.0.0:9443;"}, "neither a name"),
        ({"PRUNUS_HOST": "x|e"}, "neither a name"),
    ],
)
@needs_openssl
def test_a_gate_with_a_wrong_setting_says_which(settings, message, certificates, tmp_path):
    own = {"PRUNUS_STATE": str(tmp_path), "PRUNUS_CERTIFICATES": str(certificates)}
    done = script("gate.sh", **own, **settings)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one connection"),
        (["a", "b"], "expected one connection"),
        (["a", "--attempts=0"], "unknown option"),
        (["a", "--insecure"], "unknown option"),
        (["a", "transport=local"], "reached by transport=grid only"),
        (["a", "fleet.name=linear:5"], "the clock is the wall"),
        (["a", "num-round=3"], "num-rounds"),
    ],
)
def test_a_wrong_submission_exits_with_2_and_starts_nothing(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("server_app.submit.run_once", lambda *_: pytest.fail("a run was started"))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_submission_is_read(monkeypatch):
    found = read(["prunus", "--attempts=3", "num-rounds=2"])
    assert (found.connection, found.num_attempts) == ("prunus", 3)
    assert found.tokens == ("num-rounds=2", "fleet.name=none")
    with pytest.raises(LaunchError):
        read(["prunus", "--attempts=many"])


@pytest.mark.parametrize("merged_before", [True, False])
def test_a_run_that_was_cut_off_is_continued_from_its_last_checkpoint(merged_before, tmp_path, monkeypatch, capsys):
    tried = []

    def run_once(connection, launch, app_dir, patience_s):
        tried.append(tomllib.loads(launch.settings)["resume"])
        launch.run_dir.mkdir(parents=True)
        if merged_before and len(tried) == 1:
            (launch.run_dir / "checkpoints").mkdir()
            (launch.run_dir / "checkpoints" / "round-000001.pt").touch()
        return ("finished:completed", "") if len(tried) == 3 else ("finished:failed", "killed")

    monkeypatch.setattr("server_app.submit.run_once", run_once)
    assert main(["prunus", "--attempts=3", f"run-dir={tmp_path / 'run'}", "num-rounds=2"]) == 0
    assert tried == (["", str(tmp_path / "run"), str(tmp_path / "run")] if merged_before else ["", "", ""])
    assert "killed" in capsys.readouterr().err


def test_a_superlink_that_refuses_is_not_asked_again(tmp_path, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr("server_app.submit.run_once", lambda *_: (tried.append(1), ("", "connection refused"))[1])
    assert main(["prunus", "--attempts=3", f"run-dir={tmp_path / 'run'}"]) == 1
    assert len(tried) == 1
    assert "connection refused" in capsys.readouterr().err


def test_a_superlink_that_is_being_restarted_is_waited_for_by_a_run_that_goes_on(tmp_path, monkeypatch, capsys):
    unavailable = ({}, "Connection to the SuperLink is unavailable.")
    ended = [[{"status": "finished:failed", "status-details": "No heartbeat"}], [{"status": "finished:completed"}]]
    answers = [
        ({"success": True, "run-id": 1}, ""),
        ({"runs": ended[0]}, ""),
        unavailable,
        unavailable,
        ({"success": True, "run-id": 2}, ""),
        ({"runs": ended[1]}, ""),
    ]
    monkeypatch.setattr("server_app.submit.flwr", lambda *_: answers.pop(0))
    monkeypatch.setattr("server_app.submit.POLL_S", 0.0)
    assert main(["prunus", "--attempts=2", f"run-dir={tmp_path / 'run'}"]) == 0
    assert not answers
    assert "No heartbeat" in capsys.readouterr().err


def test_a_command_that_does_not_end_is_a_submission_that_failed(tmp_path, monkeypatch, capsys):
    def run(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr("server_app.submit.subprocess.run", run)
    assert main(["prunus", f"run-dir={tmp_path / 'run'}"]) == 1
    assert "flwr run did not end within 120 s" in capsys.readouterr().err
