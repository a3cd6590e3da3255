"""An editing service over HTTP: `fluxfire serve`, or `create_app(Settings())` in an ASGI server.

The server process has no model. `engine` has a request queue and one worker process, which runs the
pipeline. `app` handles HTTP. The other modules are their helpers. Needs `fluxfire[serve]`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxfire.serve.app import create_app
    from fluxfire.serve.settings import Settings

__all__ = ["Settings", "create_app"]

_HOME = {"Settings": "settings", "create_app": "app"}


if not TYPE_CHECKING:  # else a misspelt name would be Any

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
