"""For authors of passes: a tiny pipeline, and `check_pass`, a conformance test for any pass."""

from __future__ import annotations

from fluxfire.kontext.random_weights import tiny_kontext
from fluxfire.testing.conformance import check_pass
from fluxfire.testing.fingerprints import differences, fingerprint
from fluxfire.testing.oracle import forward_errors
from fluxfire.testing.promises import ConformanceError, edit

__all__ = [
    "ConformanceError",
    "check_pass",
    "differences",
    "edit",
    "fingerprint",
    "forward_errors",
    "tiny_kontext",
]
