"""The service keeps to its own description, whatever it is sent."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")
uvicorn = pytest.importorskip("uvicorn")
from schemathesis.specs.openapi import checks  # noqa: E402

from fluxfire.serve import Settings, create_app  # noqa: E402
from fluxfire.serve import supervisor as supervisor_module  # noqa: E402
from fluxfire.serve.keys import new_key  # noqa: E402
from fluxfire.serve.schema import MOST_PIXELS, EditRequest  # noqa: E402
from fluxfire.serve.wire import LEVELS, Batch, Done, Facts, RawPicture, Ready, Result  # noqa: E402

PATIENCE = 600
"""Seconds for an answer, on a busy machine; only one that never comes needs so many."""
UNSAID = checks.positive_data_acceptance
"""No schema says what a picture is: most strings that a schema admits are none."""
UNWELL = {("/health", "503"), ("/ready", "503")}


class InstantWorker:
    """Stands for a worker process that makes grey pictures at once."""

    pid = 1

    def __init__(self, settings):
        self.heard = None

    def start(self, heard):
        self.heard = heard
        heard(Ready(Facts("spark", "cpu", ("none",), dict.fromkeys(LEVELS, "…"), "faithful")))

    def send(self, message):
        if isinstance(message, Batch):
            made = {
                ticket: Result(
                    tuple(RawPicture(16, 16, bytes(768)) for _ in ask.seeds),
                    ("computed",) * ask.steps,
                    0.0,
                )
                for ticket, ask in message.requests.items()
            }
            self.heard(Done(made, 0.01))

    def stop(self):
        pass

    def join(self):
        pass


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A service on loopback: its application, its address, and what to send along."""
    keys = tmp_path_factory.mktemp("service") / "keys"
    key, line = new_key("ann")
    keys.write_text(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor_module, "WorkerProcess", InstantWorker)
        app = create_app(Settings(max_jobs=1000, keys_file=keys, request_seconds=PATIENCE))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield app, f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"}
        server.should_exit = True
        thread.join(PATIENCE)


def test_answers_are_as_described(service):
    """The plugin that schemathesis brings needs an older pytest, so this asks by itself."""
    _, url, key = service
    tried = set()
    described = schemathesis.openapi.from_url(f"{url}/openapi.json", timeout=PATIENCE)
    for operation in (found.ok() for found in described.get_all_operations()):

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(headers=key, excluded_checks=[UNSAID], timeout=PATIENCE)
            tried.add((case.method, case.path))

        check()
    assert {("POST", "/inference"), ("POST", "/jobs"), ("GET", "/jobs/{job_id}")} <= tried


def test_examples_and_statuses_are_there(service):
    told = service[0].openapi()
    edit = told["paths"]["/inference"]["post"]
    assert {"application/json", "multipart/form-data"} == set(edit["requestBody"]["content"])
    assert {"200", "401", "413", "422", "429", "503", "504", "507"} <= set(edit["responses"])
    assert edit["requestBody"]["content"]["application/json"]["schema"]["examples"]
    for path, operations in told["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            assert {"400", "403", "500"} <= set(answers), path  # of any service without keys
            for status in answers.keys() - {"200", "202"}:
                schema = answers[status]["content"]["application/json"]["schema"]
                wanted = "Health" if (path, status) in UNWELL else "ProblemAnswer"
                assert schema["$ref"].endswith(f"/{wanted}"), (path, status)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"width": 512}, "width needs height; give both of them"),
        ({"height": 1024}, "height needs width; give both of them"),
        ({"width": 2048, "height": 1024}, f"2097152 pixels; the limit is {MOST_PIXELS}"),
        ({"width": 2064, "height": 256}, "width"),
        ({"width": 1248, "height": 833}, "height"),
        ({"negative_prompt": "red"}, "negative_prompt needs a true_cfg_scale above 1"),
        ({"negative_prompt": "red", "true_cfg_scale": 1}, "such as 2"),
        ({"negative_prompt2": "red"}, "negative_prompt2 needs a true_cfg_scale above 1"),
        ({"true_cfg_scale": 5}, "needs a negative_prompt; add one"),
        ({"true_cfg_scale": 5, "negative_prompt2": "red"}, "needs a negative_prompt; add one"),
        ({"prompt": " \t\n\u3000"}, "white space alone says nothing"),
        ({"prompt2": " "}, "white space alone says nothing"),
        ({"negative_prompt": " ", "true_cfg_scale": 5}, "white space alone says nothing"),
    ],
)
def test_fields_without_effect_or_sense_are_refused(fields, why):
    with pytest.raises(ValidationError, match=why):
        EditRequest.model_validate({"prompt": "x"} | fields)


def test_fields_that_need_each_other_are_taken_together():
    assert EditRequest(prompt="x").size is None
    assert EditRequest(prompt="x", width=2048, height=256).size == (2048, 256)
    assert EditRequest(prompt="x", true_cfg_scale=5, negative_prompt="red", negative_prompt2="a")
    assert EditRequest(prompt="x", true_cfg_scale=1)


def test_all_sizes_that_kontext_prefers_can_be_asked_for():
    kontext = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux_kontext")
    for width, height in kontext.PREFERRED_KONTEXT_RESOLUTIONS:
        assert EditRequest(prompt="x", width=width, height=height).size == (width, height)
