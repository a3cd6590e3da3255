"""The first pass that breaks a picture: found wherever it stands, and the pipeline left plain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import fluxfire
from doubles import Bare, SkipBlock
from fluxfire.bench import bisect
from fluxfire.cli import main
from fluxfire.errors import PlanError
from fluxfire.testing import edit


@dataclass(frozen=True, kw_only=True)
class Named(Bare):
    """Does nothing, under any name."""

    name: str = "named"
    stage: ClassVar[str] = "blocks"


def listed(n, guilty):
    harmless = [Named(name=f"harmless-{i}") for i in range(n - 1)]
    return [*harmless[:guilty], SkipBlock(), *harmless[guilty:]]


def against(reference):
    def judge(pipe):
        off = float(np.abs(edit(pipe) - reference).max())
        return off > 0, f"off by {off:.3f}"

    return judge


@pytest.mark.parametrize(("n", "guilty"), [(1, 0), (2, 0), (2, 1), (5, 0), (5, 2), (5, 4), (8, 6)])
def test_the_guilty_pass_is_found(pipe, reference, n, guilty):
    passes = listed(n, guilty)
    found = bisect(pipe, passes, against(reference))
    assert found.first == guilty
    assert found.passes == tuple(passes)
    assert len(found.attempts) <= 1 + math.ceil(math.log2(n))
    assert all(t.broken == (t.count > guilty) for t in found.attempts)
    assert f"the first pass that breaks it: {SkipBlock.name}" in str(found)
    assert np.array_equal(edit(pipe), reference)
    assert fluxfire.report(pipe).passes == ()


def test_nothing_breaks(pipe, reference):
    found = bisect(pipe, [Named(name="a"), Named(name="b")], against(reference))
    assert found.first is None
    assert len(found.attempts) == 1
    assert "no pass of the list breaks it" in str(found)
    assert bisect(pipe, [], against(reference)).attempts == ()


def test_bad_lists_and_failing_judges_leave_the_pipeline_plain(pipe, reference):
    with pytest.raises(PlanError, match="nope"):
        bisect(pipe, ["nope"], against(reference))

    def failing(_):
        raise ValueError("no picture today")

    with pytest.raises(ValueError, match="no picture today"):
        bisect(pipe, listed(3, 1), failing)
    assert fluxfire.report(pipe).passes == ()
    fluxfire.optimize(pipe, [Named(name="already")])
    with pytest.raises(PlanError, match="plain pipeline"):
        bisect(pipe, listed(3, 1), against(reference))


def test_on_the_command_line(capsys):
    arguments = ["bisect", "--steps", "2", "--passes", "inductor-patch,float8"]
    assert main([*arguments, "--min-psnr", "20"]) == 0
    assert "no pass of the list breaks it" in capsys.readouterr().out
    assert main([*arguments, "--min-psnr", "99"]) == 1
    out = capsys.readouterr().out
    assert "the first pass that breaks it: float8, Float8(" in out
    assert main(["bisect", "--image", "x.png"]) == 2
    assert "go together" in capsys.readouterr().err
