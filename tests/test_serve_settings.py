"""Settings and keys of a service: what is refused, and what is kept."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxfire.cli import main, serve_options
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
        (
            {"memory": "much"},
            "memory: 'much' is no amount of memory; write such as '16GiB', or auto",
        ),
        ({"warm_up": ((1, 1),)}, "warm_up has the size 1x1; it must be a width and a height, both"),
        ({"warm_up": ((1024, 1000),)}, "warm_up has the size 1024x1000"),
        ({"warm_up": ((8192, 1024),)}, "multiples of 16 up to 4096"),
        ({"public_url": "example.org"}, "public_url='example.org'; write the address"),
        ({"public_url": "https://example.org/?a=1"}, "write the address that clients use"),
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
        ("{0} edits_per_day=0", r"line 1 of .* with edits_per_day=N and max_queue=N after it"),
        ("{0} max_queue=-1", r"line 1 of .* with edits_per_day=N and max_queue=N after it"),
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


WANTED = {
    "model": "random-tiny",
    "preset": "fast",
    "passes": None,
    "host": "::1",
    "port": 8123,
    "keys_file": Path("keys"),
    "image_hosts": ("a.example.org", "b.example.org"),
    "origins": ("https://a.example.org",),
    "public_url": "https://example.org/edit",
    "storage": "s3://bucket",
    "secret": "a secret of many characters",
    "jobs_file": Path("jobs"),
    "webhook_hosts": ("hooks.example.org",),
    "webhook_secret": "whsec_of-no-use",
    "retention_seconds": 7000.5,
    "link_seconds": 7001.0,
    "max_queue": 7,
    "max_queue_per_key": 3,
    "max_batch": 2,
    "max_bytes": 1000,
    "max_pixels": 2000,
    "max_jobs": 9,
    "job_seconds": 71.5,
    "head_seconds": 72.0,
    "request_seconds": 73.0,
    "fetch_seconds": 74.0,
    "drain_seconds": 75.0,
    "hang_seconds": 76.0,
    "log_format": "json",
    "memory": "12GiB",
    "warm_up": ((1024, 768), (512, 512)),
}
SECRETS = ("secret", "webhook_secret")
OPTIONS = {
    "keys_file": "--keys",
    "image_hosts": "--image-host",
    "origins": "--origin",
    "webhook_hosts": "--webhook-host",
    "drain_seconds": "--drain",
}


def texts(value):
    """A value as one writes it: one text for each option, or for each part of a variable."""
    if not isinstance(value, tuple):
        return [str(value)]
    return ["x".join(map(str, one)) if isinstance(one, tuple) else one for one in value]


def toml(value):
    if isinstance(value, tuple):
        return json.dumps(texts(value))
    return json.dumps(value if isinstance(value, int | float) else str(value))


@pytest.fixture
def _no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("FLUXFIRE_")]:
        monkeypatch.delenv(name)


def parsed(*options):
    parser = argparse.ArgumentParser()
    serve_options.add(parser)
    return serve_options.given(parser.parse_args(options))


def test_all_settings_are_tried_here():
    assert [field.name for field in fields(Settings)] == sorted(
        WANTED, key=[field.name for field in fields(Settings)].index
    )
    usual = Settings()
    assert [name for name, value in WANTED.items() if value == getattr(usual, name)] == ["passes"]


@pytest.mark.parametrize("way", ["options", "variables", "file"])
@pytest.mark.usefixtures("_no_variables")
def test_each_setting_can_be_set_in_each_way(way, monkeypatch, tmp_path):
    pytest.importorskip("pydantic_settings")
    from fluxfire.serve.sources import read_settings

    given, file = {}, None
    wanted = {name: value for name, value in WANTED.items() if value is not None}
    if way == "options":
        words = []
        for name in wanted.keys() - set(SECRETS):
            option = OPTIONS.get(name, "--" + name.replace("_", "-"))
            words += [word for text in texts(wanted[name]) for word in (option, text)]
        given = parsed(*words)
        wanted = {name: value for name, value in wanted.items() if name not in SECRETS}
    elif way == "variables":
        for name, value in wanted.items():
            monkeypatch.setenv(f"FLUXFIRE_{name.upper()}", ", ".join(texts(value)))
    else:
        file = tmp_path / "fluxfire.toml"
        file.write_text("\n".join(f"{name} = {toml(value)}" for name, value in wanted.items()))
    assert read_settings(given, file) == Settings(**wanted)


@pytest.mark.usefixtures("_no_variables")
def test_options_win_over_variables_and_these_over_the_file(monkeypatch, tmp_path):
    pytest.importorskip("pydantic_settings")
    from fluxfire.serve.sources import read_settings

    file = tmp_path / "fluxfire.toml"
    file.write_text("max_queue = 1\nmax_jobs = 2\nport = 3")
    monkeypatch.setenv("FLUXFIRE_MAX_QUEUE", "4")
    monkeypatch.setenv("FLUXFIRE_MAX_JOBS", "5")
    monkeypatch.setenv("FLUXFIRE_MEGACACHE_KEY", "of another part")
    monkeypatch.setenv("FLUXFIRE_PRESET", "")
    read = read_settings(parsed("--max-queue", "6"), file)
    assert (read.max_queue, read.max_jobs, read.port) == (6, 5, 3)
    assert read == Settings(max_queue=6, max_jobs=5, port=3)


@pytest.mark.parametrize(
    ("text", "variables", "said"),
    [
        ("max_queu = 3", {}, "has the unknown setting max_queu; the settings are model, preset"),
        ("max_queue = 'many'", {}, "max_queue='many': .*integer"),
        ("warm_up = ['1x']", {}, "warm_up.*'1x' is not WIDTHxHEIGHT, such as 1024x1024"),
        ("log_format = 'xml'", {}, "log_format='xml'"),
        ("max_queue = ", {}, "the settings in .* cannot be read"),
        ("", {"MAX_QUEUE": "many"}, r"max_queue='many': .*it may come from FLUXFIRE_MAX_QUEUE"),
        ("", {"MAX_QUEUE": "0"}, "max_queue=0; it must be 1 or more"),
        ("secret = 123456", {}, "secret: "),
    ],
)
@pytest.mark.usefixtures("_no_variables")
def test_settings_that_cannot_be_read(text, variables, said, monkeypatch, tmp_path):
    pytest.importorskip("pydantic_settings")
    from fluxfire.serve.sources import read_settings

    file = tmp_path / "fluxfire.toml"
    file.write_text(text)
    for name, value in variables.items():
        monkeypatch.setenv(f"FLUXFIRE_{name}", value)
    with pytest.raises(FluxfireError, match=said) as refusal:
        read_settings({}, file)
    assert "123456" not in str(refusal.value)
    with pytest.raises(FluxfireError, match="cannot be read"):
        read_settings({}, tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "variable", "said"),
    [
        (["--warm-up", "1x1"], {}, "1x1: both sides must be positive multiples of 16"),
        (["--model", "/nonexistent"], {}, "there is no folder /nonexistent"),
        ([], {"WARM_UP": "1x1"}, "warm_up has the size 1x1"),
        ([], {"MODEL": "/nonexistent"}, "there is no folder /nonexistent"),
        ([], {"PRESET": "quick"}, "quick"),
        ([], {"PASSES": "none-such"}, "none-such"),
    ],
)
@pytest.mark.usefixtures("_no_variables")
def test_what_is_wrong_is_refused_before_anything_loads(words, variable, said, monkeypatch, capsys):
    pytest.importorskip("pydantic_settings")
    from fluxfire.serve import server

    monkeypatch.setattr(server, "bind_socket", lambda _: pytest.fail("it began to serve"))
    for name, value in variable.items():
        monkeypatch.setenv(f"FLUXFIRE_{name}", value)
    try:
        assert main(["serve", *words]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    error = capsys.readouterr().err
    assert said in " ".join(error.split())
    assert "Traceback" not in error
