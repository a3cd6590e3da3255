from __future__ import annotations

import pytest

from fluxfire.spark import model, weights


@pytest.fixture
def untrained_weights(tmp_path, monkeypatch):
    """Put fresh weights where the trained ones are looked for."""
    path = tmp_path / "untrained.safetensors"
    weights.save(model.parts(), path)
    monkeypatch.setattr(weights, "SHIPPED", path)
    return path
