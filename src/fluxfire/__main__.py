"""`python -m fluxfire` is the command `fluxfire`."""

from __future__ import annotations

import sys

from fluxfire.cli import main

sys.exit(main())
