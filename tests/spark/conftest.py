from __future__ import annotations

import pytest

from fluxfire.spark import checking, model, weights
from fluxfire.spark.recogniser import Recogniser


@pytest.fixture
def untrained_weights(tmp_path, monkeypatch):
    """Put fresh weights where the trained ones are looked for."""
    path = tmp_path / "untrained.safetensors"
    weights.save({**model.parts(), "recogniser": Recogniser()}, path)
    monkeypatch.setattr(weights, "SHIPPED", path)
    checking.recogniser.cache_clear()
    yield path
    checking.recogniser.cache_clear()
