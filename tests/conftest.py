from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# Last, since some scripts there have the names of folders of tests.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fluxfire-tests-")

import pytest
import torch
from hypothesis import HealthCheck, settings

from fluxfire.testing import edit, tiny_kontext

# Tiny tensors are slower on many threads, and bits depend on their number.
torch.set_num_threads(1)

# A busy machine may take any time for an example, and to make one up.
settings.register_profile(
    "any-machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-machine")


@pytest.fixture(params=["edit", "inpaint"])
def kind(request):
    return request.param


@pytest.fixture
def pipe():
    return tiny_kontext()


@pytest.fixture(scope="session")
def reference():
    """What the plain tiny pipeline makes of the fixed picture."""
    return edit(tiny_kontext())


@contextlib.contextmanager
def _held(pid):
    def go_on():
        with contextlib.suppress(ProcessLookupError):  # the test may have ended it
            os.kill(pid, signal.SIGCONT)

    os.kill(pid, signal.SIGSTOP)
    try:
        yield go_on
    finally:
        go_on()


@pytest.fixture(scope="session")
def held():
    """Hold a process by its id, so that nothing that it does is over too early for a test.

    A context manager, which gives what lets it go on before its end.
    """
    return _held


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_dynamo(request):
    """Forget which sizes earlier tests compiled, or the number of graphs depends on them."""
    if request.node.get_closest_marker("slow"):
        torch.compiler.reset()


def _global_state():
    """What a test must leave as it was, or later tests compute other bits or compile anew."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    from fluxfire.runtime.freshness import numeric_settings

    module = torch.nn.modules.module
    hooks = ("forward_hooks", "forward_pre_hooks", "module_registration_hooks")
    return {
        "rounding": numeric_settings(torch.device("cpu")),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "modes": (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()),
        "global hooks": {n: dict(getattr(module, f"_global_{n}")) for n in hooks},
        "default device": torch.get_default_device(),
        "tracing": torch._guards.TracingContext.try_get(),
        "attention backend": str(_AttentionBackendRegistry.get_active_backend()[0]),
        "signal": signal.getsignal(signal.SIGINT),
        **{
            f"settings of {name}": sys.modules[name].get_config_copy()
            for name in ("torch._inductor.config", "torch._dynamo.config")
            if name in sys.modules
        },
    }


@pytest.fixture(autouse=True)
def _global_state_stays():
    before = _global_state()
    yield
    after = _global_state()
    for what, value in before.items():
        assert after[what] == value, f"the test left torch with another {what}"


@pytest.fixture(autouse=True)
def _suggestions_work(monkeypatch):
    """Whatever list a refusal of the suite calls workable, it must work: see that it does."""
    from fluxfire import applying
    from fluxfire.planning import check

    plan = check.make_plan
    trying = []

    def planned(pipe, passes, applied):
        made = plan(pipe, passes, applied)
        if not made.ok and made.suggestion and not trying:
            trying.append(made)
            try:
                assert plan(pipe, made.suggestion, applied).ok, made.suggestion
                if not applied:
                    applying.apply_passes(pipe, made.suggestion)
                    applying.undo(applying.find_conductor(pipe))
            finally:
                trying.clear()
        return made

    monkeypatch.setattr(applying, "make_plan", planned)
