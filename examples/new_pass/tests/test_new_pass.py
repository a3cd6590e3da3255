from __future__ import annotations

import pytest

import fluxfire
from fluxfire.errors import PlanError
from fluxfire.testing import check_pass, tiny_kontext
from fluxfire_new_pass import NewPass


@pytest.mark.parametrize("pass_", [NewPass(), NewPass(block=0, from_step=0)])
def test_it_keeps_its_promises(pass_: NewPass) -> None:
    check_pass(pass_)


def test_a_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanError, match="there is no block 99"):
        fluxfire.optimize(tiny_kontext(), [NewPass(block=99)])
