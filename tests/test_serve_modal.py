"""What would be deployed on Modal, built offline by its own package, and what runs without it."""

from __future__ import annotations

import asyncio
import importlib
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

modal = pytest.importorskip("modal")

import fluxfire  # noqa: E402
import modal_app  # noqa: E402
from modal_app import Deployment, DeploymentError, Started  # noqa: E402

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pages" / "how-to" / "deploy-on-modal.md"
EXAMPLES = ROOT / "examples"
MODULE = "modal_app"
COUNTS = st.integers(1, 1000)
CHOICES = st.builds(
    Deployment,
    model=st.sampled_from(["spark", "a/b", "./folder"]),
    preset=st.sampled_from([None, "faithful", "fast", "mine.json"]),
    storage=st.none() | st.just("s3://bucket/pictures"),
    max_queue=COUNTS,
    max_batch=COUNTS,
    max_containers=COUNTS,
    scaledown_seconds=COUNTS,
    gpu_snapshot=st.booleans(),
)


class Built:
    """The module imported anew, and what Modal's functions were made with."""

    def __init__(self, monkeypatch, **environ):
        from modal._functions import _Function
        from modal.mount import _Mount

        made, mounted, self.sources = {}, [], []
        function, mount = _Function._from_local, _Mount._from_local_python_packages
        mount_file = _Mount._from_local_file

        def record_function(info, **options):
            made[info.get_tag()] = options
            return function(info, **options)

        def record_mount(*modules, **options):
            mounted.append(mount(*modules, **options))
            return mounted[-1]

        def record_source(file, remote_path=None):
            self.sources.append((Path(file), str(remote_path)))
            return mount_file(file, remote_path)

        monkeypatch.setattr(_Function, "_from_local", staticmethod(record_function))
        monkeypatch.setattr(_Mount, "_from_local_python_packages", staticmethod(record_mount))
        monkeypatch.setattr(_Mount, "_from_local_file", staticmethod(record_source))
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delitem(sys.modules, MODULE)
        self.module = importlib.import_module(MODULE)
        (self.mount,) = mounted
        self.editor, self.prepare = made["Editor.*"], made["prepare"]


@pytest.fixture
def plain(monkeypatch):
    return Built(monkeypatch)


def secrets(options):
    return [name for s in options["secrets"] if (name := _named(s))]


def _named(secret):
    found = re.search(r"Secret\.from_name\('([^']+)'", repr(secret))
    return found and found[1]


# --- what was chosen


@given(CHOICES)
def test_what_was_chosen_reaches_the_containers(chosen):
    assert Deployment.read(chosen.variables()) == chosen


def test_without_variables_the_defaults():
    assert Deployment.read({}) == Deployment() == Deployment.read({"FLUXFIRE_MODEL": ""})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FLUXFIRE_MAX_QUEUE", "many", "FLUXFIRE_MAX_QUEUE='many'; it must be a number, 1 or more"),
        ("FLUXFIRE_MAX_BATCH", "0", "1 or more"),
        ("FLUXFIRE_MAX_CONTAINERS", "-2", "1 or more"),
        ("FLUXFIRE_GPU_SNAPSHOT", "yes", "0 or more"),
    ],
)
def test_numbers_that_are_none_are_refused(name, value, words):
    with pytest.raises(DeploymentError, match=words):
        Deployment.read({name: value})


def test_settings_have_keys_always_and_what_was_chosen():
    chosen = Deployment(model="spark", preset="fast", storage="s3://b", max_queue=7, max_batch=2)
    keys = Path("keys")
    assert modal_app.settings_arguments(chosen, keys) == {
        "model": "spark",
        "preset": "fast",
        "keys_file": keys,
        "storage": "s3://b",
        "max_queue": 7,
        "max_batch": 2,
    }
    assert modal_app.settings_arguments(chosen, keys, Path("p.json"))["preset"] == "p.json"
    assert modal_app.settings_arguments(Deployment(), keys)["preset"] is None


def test_settings_arguments_are_those_that_the_server_takes(tmp_path):
    settings = pytest.importorskip("fluxfire.serve.settings")
    made = settings.Settings(**modal_app.settings_arguments(Deployment(), tmp_path / "keys"))
    assert made.keys_file == tmp_path / "keys"


def test_keys_are_written_for_their_owner_alone(tmp_path):
    file = tmp_path / "keys"
    file.write_text("old")
    file.chmod(0o644)
    assert modal_app.write_keys({"FLUXFIRE_KEYS": "hash one\nhash two\n"}, file) == file
    assert file.read_text() == "hash one\nhash two\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("environ", [{}, {"FLUXFIRE_KEYS": " \n"}])
def test_without_keys_nothing_starts(environ, tmp_path):
    with pytest.raises(DeploymentError, match="not started without keys"):
        modal_app.write_keys(environ, tmp_path / "keys")
    assert not (tmp_path / "keys").exists()


def test_requirements_are_those_of_the_extras_with_ceilings():
    needed = [
        "torch>=2.11",
        'uvicorn[standard]>=0.30; extra == "serve"',
        'sentencepiece>=0.2; extra == "cli"',
        'para-attn>=0.3; extra == "para-attn"',
        'tomli>=2; python_version < "3"',
    ]
    assert modal_app.requirements(needed) == (
        "sentencepiece>=0.2",
        "torch<2.14,>=2.11",
        "uvicorn[standard]>=0.30",
    )


# --- the app, as Modal's package builds it


def test_building_the_app_needs_no_torch():
    code = f"import sys, {MODULE}; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=EXAMPLES
    )
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("which", ["editor", "prepare"])
def test_both_functions_share_gpu_volume_secrets_and_image(plain, which):
    made = getattr(plain, which)
    assert made["gpu"] == "H100!"
    assert made["cpu"] == modal_app.CORES
    assert made["memory"] == modal_app.MEMORY_MIB
    assert list(made["volumes"]) == ["/data"]
    assert "Volume.from_name('fluxfire'" in repr(made["volumes"]["/data"])
    assert secrets(made) == ["fluxfire", "huggingface"]
    assert made["image"] is plain.editor["image"]


def test_both_functions_bring_this_file(plain):
    assert set(plain.sources) == {(EXAMPLES / "modal_app.py", "/root/modal_app.py")}
    assert plain.editor["include_source"] is plain.prepare["include_source"] is True


def test_the_image_brings_the_package_with_weights_and_pages(plain):
    entries = plain.mount._entries
    files = {path.as_posix() for e in entries for _, path in e.get_files_to_upload()}
    assert "/root/fluxfire/serve/app.py" in files
    assert "/root/fluxfire/spark/spark.safetensors" in files
    assert "/root/fluxfire/bench/schema.json" in files
    assert not [f for f in files if "__pycache__" in f]


def test_containers_come_and_go(plain):
    made = plain.editor
    assert (made["min_containers"], made["max_containers"]) == (0, 4)
    assert made["scaledown_window"] == 60
    assert made["max_concurrent_inputs"] == 32 + 1
    assert made["target_concurrent_inputs"] == 1
    assert made["startup_timeout"] == modal_app.STARTUP_SECONDS
    assert made["enable_memory_snapshot"] is True
    assert made["experimental_options"] == {}


def test_choices_change_the_app(monkeypatch):
    built = Built(
        monkeypatch,
        FLUXFIRE_MAX_CONTAINERS="9",
        FLUXFIRE_SCALEDOWN_SECONDS="300",
        FLUXFIRE_MAX_QUEUE="10",
        FLUXFIRE_MAX_BATCH="2",
        FLUXFIRE_STORAGE="s3://bucket",
        FLUXFIRE_GPU_SNAPSHOT="1",
    )
    made = built.editor
    assert (made["max_containers"], made["scaledown_window"]) == (9, 300)
    assert (made["max_concurrent_inputs"], made["target_concurrent_inputs"]) == (12, 2)
    assert secrets(made) == ["fluxfire", "huggingface", "fluxfire-storage"]
    assert made["experimental_options"] == {"enable_gpu_snapshot": "True"}


@pytest.mark.parametrize(("chosen", "after"), [("0", ["start"]), ("1", [])])
def test_the_worker_starts_after_the_snapshot_unless_the_gpu_is_in_it(monkeypatch, chosen, after):
    from modal._partial_function import _find_partial_methods_for_user_cls, _PartialFunctionFlags
    from modal._utils.async_utils import synchronizer

    built = Built(monkeypatch, FLUXFIRE_GPU_SNAPSHOT=chosen)
    cls = synchronizer._translate_in(built.module.Editor)._get_user_cls()
    found = {
        flag: sorted(_find_partial_methods_for_user_cls(cls, flag))
        for flag in (
            _PartialFunctionFlags.ENTER_PRE_SNAPSHOT,
            _PartialFunctionFlags.ENTER_POST_SNAPSHOT,
            _PartialFunctionFlags.EXIT,
        )
    }
    assert list(found.values()) == [sorted({"imports", "start"} - {*after}), after, ["stop"]]


def test_the_description_is_of_what_was_built(plain):
    told, made = plain.module.describe(), plain.editor
    assert told["GPU"] == made["gpu"]
    assert told["CPU cores"] == made["cpu"]
    assert told["memory, MiB"] == made["memory"]
    assert told["secrets"] == ", ".join(secrets(made))
    assert told["volume"] == f"fluxfire at {next(iter(made['volumes']))}"
    assert told["containers at least"] == made["min_containers"]
    assert told["containers at most"] == made["max_containers"]
    assert told["scale-down window, s"] == made["scaledown_window"]
    assert told["requests at once, at most"] == made["max_concurrent_inputs"]
    assert (
        told["requests at once, before another container starts"]
        == (made["target_concurrent_inputs"])
    )
    assert told["startup within, s"] == made["startup_timeout"]
    assert told["memory snapshot"] == ("on" if made["enable_memory_snapshot"] else "off")
    assert told["GPU snapshot"] == ("on" if made["experimental_options"] else "off")


def test_the_page_describes_what_is_built():
    rows = [f"| {name} | {value} |" for name, value in modal_app.describe(Deployment()).items()]
    assert "\n".join(rows) in PAGE.read_text()


def test_the_page_counts_with_the_window_that_is_deployed():
    window = Deployment().scaledown_seconds
    assert f"A container goes after {window} s without a request" in " ".join(
        PAGE.read_text().split()
    )


def test_the_page_names_every_variable():
    text = PAGE.read_text()
    for name in Deployment(preset="fast", storage="s3://bucket").variables():
        assert f"`{name}`" in text


# --- starting before the server asks


class Web:
    """An application that is ready at the third time of asking."""

    def __init__(self, *, fails=False, ready=3):
        self.events, self.asked, self.ready, self.fails = [], 0, ready, fails

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            for what in ("startup", "shutdown"):
                assert (await receive())["type"] == f"lifespan.{what}"
                self.events.append(what)
                if self.fails:
                    await send({"type": f"lifespan.{what}.failed", "message": "no GPU"})
                    return
                scope["state"]["worker"] = "alive"
                await send({"type": f"lifespan.{what}.complete"})
            return
        self.asked += 1
        status = 200 if self.asked >= self.ready or scope["path"] != "/ready" else 503
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": scope["state"]["worker"].encode()})


def test_it_is_started_once_and_waited_for():
    web, sent = Web(), []

    async def send(message):
        sent.append(message)

    async def run():
        started = Started(web)
        await started.start(30)
        assert (web.events, web.asked) == (["startup"], 3)
        asked = asyncio.Queue()
        for what in ("startup", "shutdown"):
            asked.put_nowait({"type": f"lifespan.{what}"})
        await started({"type": "lifespan"}, asked.get, send)
        assert web.events == ["startup"]
        await started({"type": "http", "path": "/about"}, None, send)
        await started.stop()
        await started.stop()

    asyncio.run(run())
    assert web.events == ["startup", "shutdown"]
    assert [m["type"] for m in sent[:2]] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert sent[-1]["body"] == b"alive"


def test_what_does_not_start_says_why():
    with pytest.raises(DeploymentError, match="startup failed: no GPU"):
        asyncio.run(Started(Web(fails=True)).start(30))


def test_what_is_never_ready_is_given_up():
    with pytest.raises(DeploymentError, match=r"not ready after 0\.3 s .* 503"):
        asyncio.run(Started(Web(ready=1000)).start(0.3))


def test_it_starts_a_fastapi_application():
    fastapi = pytest.importorskip("fastapi")
    from contextlib import asynccontextmanager

    events = []

    @asynccontextmanager
    async def lifespan(_):
        events.append("begun")
        yield {"worker": 7}
        events.append("ended")

    web = fastapi.FastAPI(lifespan=lifespan)

    def ready(request):
        events.append(f"asked of {request.state.worker}")
        return fastapi.Response()

    web.add_route("/ready", ready)

    async def run():
        started = Started(web)
        await started.start(30)
        await started.stop()

    asyncio.run(run())
    assert events == ["begun", "asked of 7", "ended"]


# --- what `prepare` does


def test_warming_saves_passes_that_find_the_artifacts(tmp_path):
    from fluxfire import loading
    from fluxfire.passes import FirstBlockCache, MegaCache, QKVFusion
    from fluxfire.planning import recipes

    preset = tmp_path / "mine.json"
    recipes.write([QKVFusion(), FirstBlockCache(0.2), MegaCache("elsewhere")], preset)
    folder = tmp_path / "volume"
    told = modal_app.warm(folder, "spark", str(preset), sizes=[(64, 64)], _auto_resize=False)
    assert "mega-cache" in told
    file = folder / "kontext.megacache"
    passes = recipes.read(modal_app.recipe(folder, str(preset)))
    assert passes == (QKVFusion(), FirstBlockCache(0.2), MegaCache(str(file)))
    fluxfire.optimize(loading.load("spark"), str(folder / "passes-mine.json"))


def test_by_default_containers_are_faithful_and_requests_can_ask_for_less(tmp_path):
    from fluxfire.planning import recipes
    from fluxfire.serve import quality_levels

    assert Deployment().preset is None
    modal_app.warm(tmp_path, "spark", None, sizes=[(64, 64)], _auto_resize=False)
    file = modal_app.recipe(tmp_path, None)
    passes = recipes.read(file)
    assert passes[-1].name == "mega-cache"
    assert passes[:-1] == quality_levels.default_passes("cpu")
    assert quality_levels.current_level(passes) == "faithful"
    assert set(quality_levels.settings_by_level(passes)) == {"faithful", "balanced", "fast"}
    assert modal_app.settings_arguments(Deployment(), tmp_path, file)["preset"] == str(file)


def test_a_wrong_preset_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    from fluxfire import loading
    from fluxfire.errors import PlanError

    monkeypatch.setattr(loading, "load", lambda model: pytest.fail(f"loaded {model}"))
    with pytest.raises(PlanError, match="there is no preset 'quick'"):
        modal_app.warm(tmp_path, "spark", "quick")


@pytest.mark.slow
def test_warming_saves_artifacts(tmp_path, monkeypatch):
    from fluxfire import loading
    from fluxfire.passes import Compile
    from fluxfire.passes.shared import artifact_file
    from fluxfire.planning import recipes
    from fluxfire.testing import tiny_kontext

    def small(model):
        assert model == "small"
        return tiny_kontext(double_blocks=1, single_blocks=1)

    monkeypatch.setattr(loading, "load", small)
    recipes.write([Compile()], tmp_path / "mine.json")
    modal_app.warm(
        tmp_path, "small", str(tmp_path / "mine.json"), sizes=[(32, 32)], _auto_resize=False,
        max_sequence_length=24,
    )  # fmt: skip
    assert artifact_file.peek(tmp_path / "kontext.megacache")


@pytest.mark.filterwarnings("ignore:The prepare function is executing locally")
def test_preparing_commits_the_volume(monkeypatch):
    steps = []
    monkeypatch.setattr(modal_app, "warm", lambda *given: steps.append(given) or "told")
    monkeypatch.setattr(
        modal_app, "VOLUME", type("V", (), {"commit": lambda: steps.append("kept")})
    )
    assert modal_app.prepare.local() == "told"
    assert steps == [(modal_app.FOLDER, modal_app.CHOSEN.model, modal_app.CHOSEN.preset), "kept"]
