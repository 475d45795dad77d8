"""How long rounds and new searches go on."""

from __future__ import annotations

import pytest
import torch

from cryorecon.engines.reconstruction import Reconstruction, RefineConfig
from cryorecon.engines.rivals import N_RIVALS, Rivals
from cryorecon.engines.rounds import RoundReport
from cryorecon.physics.masks import Support
from cryorecon.run.parts import Place
from cryorecon.run.refining import Refining


class Told(Refining):
    """Rounds that are told what they find."""

    def __init__(self, config, shares, likelihood):
        self.config, self.shares, self.likelihood = config, iter(shares), likelihood
        self.searched, self.few, self.n_joint, self.moved = [], [], 0, lambda _: 0.1

    def engine_state(self):
        return {}

    def load_engine(self, state, images):
        del state, images

    def save(self, *_, **__):
        pass

    def search_again(self, state, images, *, few=False):
        del state, images
        self.searched.append(self.place.number)
        self.few.append(few)
        return next(self.shares)

    def round(self, state, images, number, *, joint):
        del images
        self.n_joint += joint
        moved = self.moved(number)
        return RoundReport(state.band, moved, 0.0, self.likelihood(number), state.band)

    def rounds(self, place=None, n=2, doubt=0.0):
        """How many were made against half maps."""
        blank = torch.zeros(4, 4, 4)
        poses = torch.eye(3).repeat(n, 1, 1), torch.zeros(n, 2), torch.arange(n) % 2
        state = Reconstruction(*poses, [blank, blank], 2.0, Support(0.4))
        if doubt:
            share = torch.zeros(n, N_RIVALS)
            share[: int(doubt * n), 0] = 0.5
            others = poses[0][:, None].repeat(1, N_RIVALS, 1, 1), torch.zeros(n, N_RIVALS, 2)
            state.rivals.put(torch.arange(n), Rivals(*others, share))
        self.place = place or Place()
        self.refine(state, None, self.place)
        return self.place.number


def rising(number):
    """By more than a hundredth in two rounds, to round 25."""
    return 40 * 1.01 ** min(number, 25)


@pytest.mark.parametrize(
    ("shares", "likelihood", "last", "rounds"),
    [
        ([0.01], rising, 3, 4),
        ([0.3, 0.3, 0.01], rising, 7, 8),
        # Many images move, but nothing is gained by it any more.
        ([0.3] * 20, lambda _: 40.0, 19, 20),
        # A hard set that is still being won.
        ([0.3] * 20, rising, 27, 28),
        ([0.3] * 20, lambda number: 40 * 1.01**number, 39, 40),
    ],
    ids=["settled", "settled later", "for nothing", "while it rises", "at most"],
)
def test_new_searches_go_on_while_they_are_worth_it(shares, likelihood, last, rounds):
    told = Told(RefineConfig(), shares, likelihood)
    assert told.rounds() == rounds
    assert told.searched[-1] == last


@pytest.mark.parametrize(("doubt", "few"), [(0.0, [False, True, True]), (0.05, [False] * 3)])
def test_images_that_fit_are_searched_once_where_few_are_in_doubt(doubt, few):
    told = Told(RefineConfig(), [0.3, 0.05, 0.01], rising)
    told.rounds(n=100, doubt=doubt)
    assert told.searched == [3, 5, 7]
    assert told.few == few


@pytest.mark.parametrize(("moved", "n_joint"), [(0.06, 3), (0.04, 1)])
def test_joint_rounds_end_when_poses_settle(moved, n_joint):
    told = Told(RefineConfig(), [0.01], rising)
    told.moved = lambda _: moved
    told.rounds()
    assert told.n_joint == n_joint


def test_a_part_in_its_joint_rounds_makes_no_others():
    """As the symmetric part of a checkpoint of an older version."""
    told = Told(RefineConfig(), [], rising)
    assert told.rounds(Place(joint=1)) == 0
    assert told.searched == []
