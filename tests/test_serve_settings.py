"""Settings and keys of a service: what is refused, and what is kept."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxfire.cli import main
from fluxfire.errors import FluxfireError
from fluxfire.serve.keys import Keys, new_key
from fluxfire.serve.settings import Settings


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_needs_no_keys(host):
    assert Settings(host=host).on_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_others_do(host, tmp_path):
    with pytest.raises(FluxfireError, match="so the service needs keys: make one with fluxfire"):
        Settings(host=host)
    Settings(host=host, keys_file=tmp_path / "keys")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_queue": 0}, "max_queue=0; it must be 1 or more"),
        ({"port": 70000}, "port=70000; it must be from 0 to 65535"),
        ({"request_seconds": 0}, "request_seconds=0; it must be above 0"),
        ({"preset": "fast", "passes": "compile"}, "preset and passes exclude each other"),
        ({"origins": ("*",)}, "would allow every site; name the sites"),
    ],
)
def test_what_makes_no_sense(settings, message):
    with pytest.raises(FluxfireError, match=message):
        Settings(**settings)
    with pytest.raises(FrozenInstanceError):
        Settings().port = 3


def test_keys(tmp_path):
    made = {name: new_key(name) for name in ("ann", "bob@example.org")}
    file = tmp_path / "keys"
    file.write_text("# who may\n\n" + "\n".join(line for _, line in made.values()) + "\n")
    keys = Keys.read(file)
    for name, (key, _) in made.items():
        assert keys.owner(key) == name
        assert key not in file.read_text()
    assert keys.owner("") is None


def test_keys_follow_their_file(tmp_path, caplog):
    (ann, of_ann), (bob, of_bob) = new_key("ann"), new_key("bob")
    file = tmp_path / "keys"
    file.write_text(f"{of_ann}\n")
    keys = Keys.read(file)
    file.write_text(f"{of_ann}\n{of_bob}\n")
    assert keys.owner(bob) == "bob"
    file.write_text(f"{of_bob}\n\n\n")
    assert keys.owner(ann) is None
    assert keys.owner(bob) == "bob"
    file.write_text("nonsense")
    assert keys.owner(bob) == "bob"
    assert "the keys stay as they were: line 1 of" in caplog.text
    file.unlink()
    assert keys.owner(bob) == "bob"
    file.write_text(f"{of_ann}\n")
    assert (keys.owner(ann), keys.owner(bob)) == ("ann", None)


@given(st.text())
def test_no_other_key_will_do(guess):
    key, line = new_key("ann")
    name, digest = line.split(" sha256:")
    keys = Keys({name: digest})
    assert (keys.owner(guess) is None) == (guess != key)
    assert keys.owner(digest) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key; fluxfire serve --new-key NAME makes one"),
        ("ann", r"line 1 of .* is not a name and sha256:HASH"),
        ("ann sha256:12", r"line 1 of .* is not a name and sha256:HASH"),
        ("{0}\n{0}", r"line 2 of .* names a key a second time"),
    ],
)
def test_files_that_hold_no_keys(text, message, tmp_path):
    file = tmp_path / "keys"
    file.write_text(text.format(new_key("ann")[1]))
    with pytest.raises(FluxfireError, match=message):
        Keys.read(file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FluxfireError, match=r"the keys in .* cannot be read"):
        Keys.read(tmp_path / "none")
    with pytest.raises(FluxfireError, match="'two words' cannot name a key"):
        new_key("two words")


def test_the_server_is_without_torch():
    """The application, and all that it is made of, in a fresh interpreter."""
    pytest.importorskip("fastapi")
    code = (
        "import sys; from fluxfire.serve import Settings, create_app; create_app(Settings()); "
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy', 'boto3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_large_models_make_one_picture_at_a_time_unless_told():
    assert Settings().at_once == 4
    assert Settings(model="black-forest-labs/FLUX.1-Kontext-dev").at_once == 1
    assert Settings(model="random-full", max_batch=2).at_once == 2
    with pytest.raises(FluxfireError, match="max_batch=0; it must be 1 or more"):
        Settings(max_batch=0)


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded(capsys):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in said
    assert "choose another --port or --host" in said
    assert "Traceback" not in said


def test_answers_are_not_held_back_by_nagle():
    pytest.importorskip("uvicorn")
    from fluxfire.serve.server import bind_socket

    async def answered():
        nodelay = []

        def seen(_reader, writer):
            line = writer.get_extra_info("socket")
            nodelay.append(line.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind_socket(Settings(port=0)) as listener:
            server = await asyncio.start_server(seen, sock=listener)
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await reader.read()
            writer.close()
            server.close()
        return nodelay

    assert asyncio.run(answered()) == [1]
