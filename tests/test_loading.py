"""Loading, against a hub on this machine that answers as the real one does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from fluxfire import loading
from fluxfire.errors import LoadError
from fluxfire.loading import hub_token, load
from fluxfire.testing import edit, tiny_kontext


@pytest.fixture(scope="module")
def hub():
    """Answer 401, 403 or 404, as the id's last part asks; remember the paths and tokens sent."""

    class Handler(BaseHTTPRequestHandler):
        asked = []  # noqa: RUF012

        def do_GET(self):
            self.asked.append((self.path, self.headers.get("Authorization")))
            status = next((s for s in (401, 403, 404) if str(s) in self.path), 500)
            code = {401: "GatedRepo", 403: "GatedRepo", 404: "RepoNotFound"}.get(status)
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", Handler.asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def said(hub, tmp_path_factory):
    """What loading a model for each status says, in a process that is not offline."""
    code = (
        "import sys, fluxfire.loading as l\n"
        "for status in sys.argv[1:]:\n"
        "    try: l.load(f'someone/model-{status}')\n"
        "    except l.LoadError as e: print(e)"
    )
    settings = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    settings |= {
        "HF_ENDPOINT": hub[0], "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_mine",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_HUB_ETAG_TIMEOUT": "600", "HF_HUB_DOWNLOAD_TIMEOUT": "600",
    }  # fmt: skip
    statuses = ["401", "403", "404"]
    done = subprocess.run(
        [sys.executable, "-c", code, *statuses],
        capture_output=True,
        text=True,
        env=settings,
        check=False,
        timeout=600,
    )
    return dict(zip(statuses, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_gated_model_says_accept_the_licence_then_set_the_token(hub, said, status):
    assert said[status] == (
        f"the hub refused someone/model-{status}: if it is gated, accept the licence on "
        f"https://huggingface.co/someone/model-{status}, then set HF_TOKEN (environment or "
        f".env) to a token of that account"
    )
    assert "Bearer hf_mine" in [token for path, token in hub[1] if status in path]


def test_an_unknown_model(said):
    assert said["404"] == "the hub has no model someone/model-404; check the id's spelling"


def test_a_saved_pipeline_is_loaded(pipe, reference, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = load(str(tmp_path), device="cpu")
    again.set_progress_bar_config(disable=True)
    assert np.abs(edit(again) - reference).max() < 1e-5


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nowhere", "there is no folder ./nowhere, and it is no hub id"),
        ("kontext", "there is no folder kontext, and it is no hub id"),
        ("a/b/c", "there is no folder a/b/c"),
    ],
)
def test_what_is_neither_folder_nor_id(model, words):
    with pytest.raises(LoadError, match=words):
        load(model)


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(LoadError, match=r"it has no model_index.json"):
        load(str(tmp_path))


def test_a_damaged_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "transformer" / "config.json").write_text("{")
    with pytest.raises(LoadError, match="could not be loaded"):
        load(str(tmp_path))


def test_damaged_weights(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(LoadError, match="could not be loaded"):
        load(str(tmp_path))


def test_a_folder_needs_no_token(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / ".env").write_text("OTHER=1\n")
    monkeypatch.setitem(sys.modules, "dotenv", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    load("~/model", device="cpu")


def test_token_from_the_environment_or_a_dotenv_file(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert hub_token(tmp_path) is None
    (tmp_path / ".env").write_text('# mine\nHF_TOKEN="hf_from_file"\n')
    assert hub_token(tmp_path) == "hf_from_file"
    monkeypatch.setenv("HF_TOKEN", "hf_from_environment")
    assert hub_token(tmp_path) == "hf_from_environment"


def test_a_dotenv_file_that_cannot_be_read(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setitem(sys.modules, "dotenv", None)
    (tmp_path / ".env").write_text("HF_TOKEN=x\n")
    with pytest.raises(LoadError, match=r'pip install "fluxfire\[cli\]"'):
        hub_token(tmp_path)


@pytest.mark.parametrize(
    ("version", "argument"),
    [
        ("0.35.0", "torch_dtype"),
        ("0.39.1", "torch_dtype"),
        ("0.40.0", "dtype"),
        ("0.41.0.dev0", "dtype"),
        ("1.0.0", "dtype"),
    ],
)
def test_the_dtype_is_given_by_the_name_that_diffusers_knows(monkeypatch, version, argument):
    monkeypatch.setattr(loading.metadata, "version", {"diffusers": version}.__getitem__)
    assert loading._dtype_argument() == argument


def test_loading_a_folder_in_a_dtype_warns_of_nothing(tmp_path):
    tiny_kontext().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = load(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert {pipe.transformer.dtype, pipe.vae.dtype} == {torch.bfloat16}
