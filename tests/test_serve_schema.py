"""The service keeps to its own description, whatever it is sent."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")
from starlette.testclient import TestClient  # noqa: E402

from fluxfire.serve import Settings, create_app  # noqa: E402
from fluxfire.serve import engine as engine_module  # noqa: E402
from fluxfire.serve.wire import LEVELS, Batch, Done, Facts, Raw, Ready, Result  # noqa: E402

HOST = {"Host": "localhost"}


class InstantWorker:
    """Stands for a worker process that makes grey pictures at once."""

    pid = 1

    def __init__(self, settings):
        self.heard = None

    def start(self, heard):
        self.heard = heard
        heard(Ready(Facts("spark", "cpu", ("none",), LEVELS, "balanced")))

    def send(self, message):
        if isinstance(message, Batch):
            made = {
                ticket: Result(
                    tuple(Raw(16, 16, bytes(768)) for _ in ask.seeds),
                    ("computed",) * ask.steps,
                    0.0,
                )
                for ticket, ask in message.asks.items()
            }
            self.heard(Done(made, 0.01))

    def stop(self):
        pass


@pytest.fixture(scope="module")
def app():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "WorkerProcess", InstantWorker)
        made = create_app(Settings(max_jobs=1000))
        with TestClient(made, base_url="http://localhost"):
            yield made


def operations(app):
    """Every operation but those that are no JSON: schemathesis' own plugin needs an older pytest."""
    found = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HOST)
    for operation in map(lambda one: one.ok(), found.get_all_operations()):
        if operation.path != "/metrics":
            yield operation


def test_answers_are_as_described(app):
    tried = set()
    for operation in operations(app):

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(headers=HOST)
            tried.add((case.method, case.path))

        check()
    assert {("POST", "/inference"), ("POST", "/jobs"), ("GET", "/jobs/{job_id}")} <= tried


def test_examples_and_statuses_are_there(app):
    told = app.openapi()
    edit = told["paths"]["/inference"]["post"]
    assert {"application/json", "multipart/form-data"} == set(edit["requestBody"]["content"])
    assert {"200", "401", "413", "422", "429", "503", "504", "507"} <= set(edit["responses"])
    assert edit["requestBody"]["content"]["application/json"]["schema"]["examples"]
