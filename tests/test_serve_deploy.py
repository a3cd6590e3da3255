"""The files of `examples/deploy`: what can be checked without the programs that read them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from fluxfire.serve import Settings

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "deploy"
NAMES = {field.name for field in fields(Settings)}
LARGEST_BODY = 4 * -(-Settings.max_bytes // 3) + 2**20


def read(name):
    return (FOLDER / name).read_text()


def steps(instruction):
    """A Dockerfile's instructions of one kind, each on one line."""
    lines = re.sub(r"\\\n\s*", "", read("Dockerfile"))
    return re.findall(rf"^{instruction} (.*)$", lines, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_each_variable_is_a_setting(path):
    told = set(re.findall(r"\bFLUXFIRE_([A-Z_]+)", path.read_text()))
    assert {name.lower() for name in told} <= NAMES
    assert told or path.name in {"Caddyfile", "nginx.conf"}


def test_the_file_of_settings_can_be_read(monkeypatch):
    pytest.importorskip("pydantic_settings")
    from fluxfire.serve.sources import read_settings

    for name in [name for name in os.environ if name.startswith("FLUXFIRE_")]:
        monkeypatch.delenv(name)
    settings = read_settings({}, FOLDER / "fluxfire.toml")
    for name, value in tomllib.loads(read("fluxfire.toml")).items():
        assert str(getattr(settings, name)).removesuffix(".0") == str(value)
    assert settings.keys_file == Path("/etc/fluxfire/keys")


def test_what_the_dockerfile_copies_and_installs_is_there():
    for sources in steps("COPY"):
        *names, _ = sources.split()
        for name in names:
            assert (ROOT / name).exists(), name
    (torch, package) = (line for line in steps("RUN") if "pip install" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = (one for one in project["dependencies"] if one.startswith("torch>"))
    assert f'"{needed}"' in torch
    (extras,) = re.findall(r"\.\[(.*)\]", package)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    files = {project["readme"], *project["license-files"], "pyproject.toml", "src"}
    assert files <= set(" ".join(steps("COPY")).split())


def test_nobody_is_served_without_keys_in_a_container():
    variables = dict(re.findall(r"(FLUXFIRE_\w+)=(\S+)", read("Dockerfile")))
    assert variables["FLUXFIRE_HOST"] == "0.0.0.0"
    assert variables["FLUXFIRE_KEYS_FILE"]


def test_supervisors_wait_for_longer_than_the_drain():
    compose = yaml.safe_load(read("compose.yaml"))["services"]["fluxfire"]
    pod = next(yaml.safe_load_all(read("kubernetes.yaml")))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    unit = dict(re.findall(r"^(\w+)=(.*)$", read("fluxfire.service"), re.MULTILINE))
    drain = tomllib.loads(read("fluxfire.toml"))["drain_seconds"]
    for waits, drains in (
        (compose["stop_grace_period"].removesuffix("s"), compose["environment"]),
        (pod["terminationGracePeriodSeconds"], variables),
        (unit["TimeoutStopSec"], {"FLUXFIRE_DRAIN_SECONDS": drain}),
    ):
        assert int(waits) >= int(drains["FLUXFIRE_DRAIN_SECONDS"]) + 5


def test_the_probes_ask_paths_that_exist():
    pytest.importorskip("fastapi")
    from fluxfire.serve import create_app

    routes = create_app(Settings()).openapi()["paths"]
    (container,) = next(yaml.safe_load_all(read("kubernetes.yaml")))["spec"]["template"]["spec"][
        "containers"
    ]
    probes = {name: container[name]["httpGet"]["path"] for name in container if "Probe" in name}
    assert probes["livenessProbe"] == "/health"
    assert probes["readinessProbe"] == probes["startupProbe"] == "/ready"
    assert {*probes.values(), "/metrics"} <= routes.keys()
    assert "/health" in "".join(
        re.findall(r"^HEALTHCHECK (?:.*\\\n)*.*$", read("Dockerfile"), re.MULTILINE)
    )


def test_proxies_let_through_what_the_service_takes():
    nginx, caddy = read("nginx.conf"), read("Caddyfile")
    (size,) = re.findall(r"client_max_body_size (\d+)m;", nginx)
    assert int(size) * 2**20 >= LARGEST_BODY
    (size,) = re.findall(r"max_size (\d+)MB", caddy)
    assert int(size) * 10**6 >= LARGEST_BODY
    for seconds in (
        *re.findall(r"proxy_read_timeout (\d+)s;", nginx),
        *re.findall(r"response_header_timeout (\d+)s", caddy),
    ):
        assert int(seconds) > Settings.request_seconds
    assert "proxy_buffering off;" in nginx
    assert "flush_interval -1" in caddy
    for text in (nginx, caddy):
        assert text.count("{") == text.count("}")
    for line in nginx.splitlines():
        code = line.partition("#")[0].strip()
        assert not code or code.endswith((";", "{", "}")), line


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path):
    # It looks for the program, too, which is nowhere here.
    text = read("fluxfire.service").replace("/opt/fluxfire/bin/fluxfire", "/bin/true")
    unit = tmp_path / "fluxfire.service"
    unit.write_text(text.replace("User=fluxfire", "User=root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    about_it = [line for line in done.stderr.splitlines() if "fluxfire.service" in line]
    assert about_it == []
