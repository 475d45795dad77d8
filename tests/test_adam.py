"""Adam's steps are those of torch's class, without what that loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cryorecon.engines.adam import Adam


def parameters(generator):
    generator.manual_seed(3)
    return [torch.randn(n, 3, generator=generator).requires_grad_() for n in (2, 5)]


def loss(values, step):
    """Of the first alone, at every third step."""
    first = (values[0] ** 4).sum()
    return first if step % 3 == 0 else first + ((values[1] - 1) ** 2).sum()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.7, 0.9)])
def test_steps_are_those_of_torch(generator, betas):
    mine, theirs = parameters(generator), parameters(generator)
    ours, other = Adam(mine, 0.03, betas), torch.optim.Adam(theirs, 0.03, betas, fused=True)
    for step in range(20):
        for values, optimiser in ((mine, ours), (theirs, other)):
            optimiser.zero_grad()
            loss(values, step).backward()
            optimiser.step()
    for one, two in zip(mine, theirs, strict=True):
        assert torch.equal(one, two)


def test_going_on_from_a_state_is_the_same(generator):
    whole, parted = parameters(generator), parameters(generator)
    first, second = Adam(whole, 0.1), Adam(parted, 0.1)
    for step in range(9):
        for values, optimiser in ((whole, first), (parted, second)):
            optimiser.zero_grad()
            loss(values, step).backward()
            optimiser.step()
        fresh = Adam(parted, 0.1)
        fresh.load(second.state())
        second = fresh
    assert torch.equal(whole[1], parted[1])


@pytest.mark.slow
def test_a_job_does_without_torchs_compiler(stack_32, tmp_path):
    """A second of every job."""
    words = ["abinitio-rmfn", str(stack_32 / "particles.star"), "-o", str(tmp_path / "job")]
    for setting in ("half_rounds=1", "joint_rounds=1", "temperatures=[5.0,1.0]"):
        words += ["--set", setting]
    script = (
        f"import sys; sys.argv[1:] = {words}\n"
        "from cryorecon.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
