"""Keys on disk, and the gate that refuses to open when it does not keep strangers out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aecontrol.errors import BadInput, InstrumentFault
from drivers.gate import Gate
from drivers.keys import KeyRing, load_client, new_keys
from drivers.sockets import ControlServer, Dealer


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    files = new_keys(folder)
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    before = {file: file.read_bytes() for file in files}
    (folder / "server.secret").unlink()
    with pytest.raises(BadInput, match="never overwritten"):
        new_keys(folder)
    assert not (folder / "server.secret").exists()
    assert all(file.read_bytes() == before[file] for file in files if file.exists())
    secret = before[folder / "controller.secret"].decode().strip()
    assert secret not in repr(load_client(folder / "controller.secret", folder / "server.public"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    new_keys(tmp_path)
    (tmp_path / "server.secret").chmod(mode)
    with pytest.raises(BadInput, match="chmod 600"):
        KeyRing.load(tmp_path)
    (tmp_path / "server.secret").chmod(0o600)
    assert {peer.role for peer in KeyRing.load(tmp_path).peers.values()} == {"observer", "controller", "operator"}
    (tmp_path / "authorized.toml").chmod(0o622)  # whoever writes the list lets himself in
    with pytest.raises(BadInput, match="chmod 600"):
        KeyRing.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("observer", "root"),
        lambda text: text + "admin = true\n",
        lambda text: text.replace('public = "', 'public = "x'),
        lambda text: text + text[text.index("[peers.controller]") :].replace("[peers.", "[peers.second_"),
        lambda text: text.replace("[peers.operator]", '[peers."../operator"]'),
        lambda text: text + "#" * (1 << 20),
        lambda text: "[" * 100_000,
        lambda text: "",
    ],
)
def test_a_malformed_list_is_refused(tmp_path: Path, change: Callable[[str], str]) -> None:
    new_keys(tmp_path)
    path = tmp_path / "authorized.toml"
    path.write_text(change(path.read_text()))
    with pytest.raises(BadInput):
        KeyRing.load(tmp_path)


@pytest.mark.parametrize("text", ["", "short", "\x00" * 40, "~" * 40, "#" * 40, "é" * 40, "0" * 41, "0" * 500])
def test_what_is_not_a_key_is_refused(tmp_path: Path, text: str) -> None:
    new_keys(tmp_path)
    (tmp_path / "server.public").write_text(text)
    with pytest.raises(BadInput):
        load_client(tmp_path / "controller.secret", tmp_path / "server.public")


class OpenGate(Gate):
    """Admits everybody, as libzmq does without an authenticator."""

    def _verdict(self, asked: list[bytes]) -> list[bytes]:
        return [b"1.0", asked[1], b"200", b"OK", b"anybody", b""]


class ShutGate(Gate):
    """Admits nobody."""

    def _verdict(self, asked: list[bytes]) -> list[bytes]:
        return [b"1.0", asked[1], b"400", b"no", b"", b""]


class SilentGate(Gate):
    """Answers nobody."""

    def answer(self, most: int = 16) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        (OpenGate, "stranger's key .* admitted"),
        (ShutGate, "a known key .* refused"),
        (SilentGate, "stranger's key .* no answer"),
    ],
)
def test_a_gate_that_does_not_work_refuses_to_open(tmp_path: Path, kind: type[Gate], mistake: str) -> None:
    new_keys(tmp_path)
    gate = kind(KeyRing.load(tmp_path))
    with pytest.raises(InstrumentFault, match=mistake):
        ControlServer(gate, "tcp://127.0.0.1:*")
    gate.close()


def test_without_keys_only_a_simulator_on_loopback(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="aecontrol keys new"):
        Gate(None)
    gate = Gate(None, simulated=True)
    for address in ("tcp://192.0.2.1:5555", "tcp://[2001:db8::1]:5555"):
        with pytest.raises(BadInput, match="no keys"):
            ControlServer(gate, address)
    for address in ("tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://localhost:5555", "tcp://eth0:1", "ipc:///tmp/x", ""):
        with pytest.raises(BadInput):
            ControlServer(gate, address)
    server = ControlServer(gate, "tcp://127.0.0.1:*")
    with pytest.raises(BadInput, match="cannot listen"):
        ControlServer(gate, server.address)
    client = Dealer(gate.context, server.address, None)
    client.send(b"hello")
    assert server.socket.poll(1000)
    assert [(m.user, m.role, m.header) for m in server.receive()] == [("local", "operator", b"hello")]
    client.close()
    server.close()
    gate.close()
