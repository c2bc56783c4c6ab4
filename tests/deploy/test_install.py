"""The commands of docs/deploy.md's section "A federation", carried out in a folder in the place of the root.

What they make is then started as systemd would: as the unit's user, with the unit's environment, by the unit's command.
Stand-ins take the place of systemd and of Flower's programs; the latter read every file that they are given.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USER, UID = "nobody", 65534
READS = """#!/bin/bash
for word in "$@"; do
    case "$word" in
        *.db | *.log) echo something >>"$word" || exit 9 ;;
        "$PLACE"/*) [[ -d "$word" ]] || head -c 1 "$word" >/dev/null || exit 9 ;;
    esac
done
echo "$(basename "$0") $(id -u) $*"
"""
SAYS = '#!/bin/bash\necho "$(basename "$0") $*" >>"$PLACE/said"\n'

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the guide is for root, who starts services as another user"),
    pytest.mark.skipif(
        not all(shutil.which(name) for name in ("openssl", "ssh-keygen", "bash", "install", "env")),
        reason="openssl, ssh-keygen and the usual tools are needed",
    ),
]


def blocks(section: str) -> list[str]:
    """The commands of a section, block by block."""
    text = (ROOT / "docs" / "deploy.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@dataclass
class Machine:
    """A folder that stands for a machine's root."""

    place: Path

    @property
    def stand_ins(self) -> Path:
        """Programs that would change the machine that the tests run on."""
        return self.place / "stand-ins"

    def moved(self, text: str) -> str:
        """Paths of the guide as paths below the folder, and its user as one that there is."""
        for path in ("/opt/prunus", "/etc/", "/var/lib/"):
            text = re.sub(rf"(?<![\w/.]){re.escape(path)}", f"{self.place}{path}", text)
        text = re.sub(r"-o prunus -g prunus", f"-o {USER} -g {UID}", text)
        return re.sub(r"\bchown prunus\b", f"chown {USER}", text)

    def set_up(self) -> None:
        """A checkout, and stand-ins for what there is not."""
        programs = self.place / "opt" / "prunus" / ".venv" / "bin"
        programs.mkdir(parents=True)
        shutil.copytree(ROOT / "deploy", self.place / "opt" / "prunus" / "deploy")
        (self.place / "etc" / "systemd" / "system").mkdir(parents=True)
        self.stand_ins.mkdir()
        for folder, name in (
            (self.stand_ins, "systemctl"),
            (self.stand_ins, "useradd"),
            (programs, "flwr"),
            (programs, "python"),
        ):
            self.program(folder / name, SAYS)
        for name in ("flower-superlink", "nginx", "python3"):
            self.program(programs / name, READS)
        for path in [*self.place.glob("opt/prunus/deploy/**/*"), self.place / "opt" / "prunus" / "deploy"]:
            if path.is_file() and path.suffix in (".env", ".service"):
                path.write_text(self.moved(path.read_text()))
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def carry_out(self, commands: str) -> str:
        """The block, as root types it; returns what its stand-ins were told."""
        commands = self.moved(commands).replace(" --wait", "")  # nothing listens here
        done = subprocess.run(
            ["bash", "-euc", "umask 022\n" + commands],
            cwd=self.place / "opt" / "prunus",
            env={
                "PATH": f"{self.stand_ins}:{os.environ['PATH']}",
                "PLACE": str(self.place),
                "HOME": str(self.place / "root"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said = self.place / "said"
        return said.read_text() if said.exists() else ""

    def unit(self, name: str) -> dict[str, str]:
        """The settings of an installed unit."""
        template = re.sub(r"@[^.]*", "@", name)
        text = (self.place / "etc" / "systemd" / "system" / f"{template}.service").read_text()
        found = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
        return {key: value.replace("%i", name.partition("@")[2]) for key, value in found.items()}

    def start(self, name: str) -> str:
        """What a unit's program says: the stand-in's words if it could read all that it was given."""
        unit = self.unit(name)
        assert unit["User"] == "prunus"
        state = self.place / "var" / "lib" / unit["StateDirectory"]
        if not state.exists():
            state.mkdir(mode=int(unit["StateDirectoryMode"], 8))
            os.chown(state, UID, UID)
        lines = Path(unit["EnvironmentFile"]).read_text().splitlines()
        settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        done = subprocess.run(
            shlex.split(unit["ExecStart"]),
            cwd="/",
            env=settings | {"PLACE": str(self.place)},
            user=UID,
            group=UID,
            extra_groups=[],
            umask=0o022,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def made() -> Machine:
    machine = Machine(Path(tempfile.mkdtemp(prefix="prunus-install-")))
    machine.place.chmod(0o755)
    machine.set_up()
    return machine


@pytest.fixture(scope="module")
def server() -> Iterator[Machine]:
    machine = made()
    machine.carry_out(blocks("A federation")[0])
    yield machine
    shutil.rmtree(machine.place)


@pytest.fixture(scope="module")
def device(server) -> Iterator[Machine]:
    machine = made()
    shutil.copy(server.place / "etc/prunus/certificates/ca.crt", machine.place / "opt/prunus/ca.crt")
    machine.carry_out(blocks("A federation")[1])
    yield machine
    shutil.rmtree(machine.place)


def test_the_servers_units_start_as_their_user_with_what_the_guide_has_made(server):
    assert f"flower-superlink {UID} " in server.start("prunus-superlink")
    assert f"nginx {UID} " in server.start("prunus-gate")
    assert "enable --now prunus-superlink prunus-gate" in (server.place / "said").read_text()


def test_they_start_again_after_root_has_renewed_the_certificate(server):
    folder = server.place / "etc" / "prunus" / "certificates"
    before = (folder / "server.key").read_bytes()
    server.carry_out("deploy/certificates.sh /etc/prunus/certificates localhost")
    assert (folder / "server.key").read_bytes() != before
    assert (folder / "server.key").stat().st_mode & 0o077 == 0
    server.start("prunus-superlink")
    server.start("prunus-gate")


def test_the_authoritys_key_stays_roots_through_a_rotation(server):
    folder = server.place / "etc" / "prunus" / "certificates"
    server.carry_out(
        "deploy/certificates.sh --new-ca /etc/prunus/certificates\n"
        "deploy/certificates.sh /etc/prunus/certificates localhost"
    )
    assert (folder / "ca.key").stat().st_uid == 0
    assert (folder / "ca.key").stat().st_mode & 0o077 == 0
    server.start("prunus-superlink")


def test_a_user_who_may_not_give_a_key_to_its_owner_replaces_none(server, tmp_path):
    folder = Path(tempfile.mkdtemp(prefix="prunus-keys-"))
    try:
        done = subprocess.run([ROOT / "deploy/certificates.sh", folder, "localhost"], capture_output=True, check=False)
        assert done.returncode == 0
        before = (folder / "server.key").read_bytes()
        (folder / "ca.key").chmod(0o644)
        folder.chmod(0o777)
        command = [server.place / "opt/prunus/deploy/certificates.sh", folder, "localhost"]
        done = subprocess.run(
            command, user=UID, group=UID, extra_groups=[], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "run this as root or as that user" in done.stderr
        assert (folder / "server.key").read_bytes() == before
        assert sorted(path.name for path in folder.iterdir()) == [
            "ca.crt",
            "ca.key",
            "ca.pem",
            "server.key",
            "server.pem",
        ]
    finally:
        shutil.rmtree(folder)


def test_the_superlinks_database_is_nobody_elses_to_read_and_one_that_was_is_closed(server):
    server.start("prunus-superlink")
    database = server.place / "var/lib/prunus/superlink/superlink.db"
    assert database.stat().st_mode & 0o077 == 0
    assert database.parent.stat().st_mode & 0o077 == 0
    database.chmod(0o644)
    server.start("prunus-superlink")
    assert database.stat().st_mode & 0o077 == 0
    assert int(server.unit("prunus-superlink")["StateDirectoryMode"], 8) & 0o077 == 0


def test_the_run_of_the_guide_goes_where_the_superlinks_unit_may_write(server):
    (server.place / "opt/prunus/key.pub").touch()
    said = server.carry_out(blocks("A federation")[2])
    assert "flwr supernode register key.pub prunus" in said
    (run_dir,) = re.findall(r"server_app.submit prunus .*\brun-dir=(\S+)", said)
    unit = server.unit("prunus-superlink")
    assert unit["ProtectSystem"] == "strict"
    assert Path(run_dir).is_relative_to(server.place / "var" / "lib" / unit["StateDirectory"])
    subprocess.run(["mkdir", "-p", run_dir], user=UID, group=UID, extra_groups=[], check=True)


def test_a_devices_unit_starts_as_its_user_also_after_root_has_made_another_key(device):
    said = device.start("prunus-supernode@NAME")
    assert f"python3 {UID} " in said
    assert "data=" not in said  # a file that is not there would keep the node from starting
    key = device.place / "var" / "lib" / "prunus" / "key"
    device.carry_out("deploy/node-key.sh rotate /var/lib/prunus/key")
    (new,) = (path for path in key.parent.glob("key.2*") if path.suffix != ".pub")
    settings = device.place / "etc" / "prunus" / "NAME.env"
    settings.write_text(settings.read_text().replace(f"PRUNUS_KEY={key}\n", f"PRUNUS_KEY={new}\n"))
    assert str(new) in device.start("prunus-supernode@NAME")


def test_two_nodes_of_a_device_can_have_ports_of_their_own(device):
    settings = device.place / "etc" / "prunus" / "NAME.env"
    assert "PRUNUS_NODE_PORT=9094\n" in settings.read_text()
    other = settings.with_name("OTHER.env")
    other.write_text(settings.read_text().replace("PRUNUS_NODE_PORT=9094", "PRUNUS_NODE_PORT=9095"))
    assert "--port 9095" in device.start("prunus-supernode@OTHER")
