"""How long rounds and new searches go on."""

from __future__ import annotations

import pytest
import torch

from cryorecon.engines.reconstruction import Reconstruction, RefineConfig
from cryorecon.engines.rounds import RoundReport
from cryorecon.physics.masks import Support
from cryorecon.run.parts import Place
from cryorecon.run.refining import Refining


class Told(Refining):
    """Rounds that are told what they find."""

    def __init__(self, config, shares, likelihood):
        self.config, self.shares, self.likelihood = config, iter(shares), likelihood
        self.searched = []

    def engine_state(self):
        return {}

    def load_engine(self, state, images):
        del state, images

    def save(self, *_, **__):
        pass

    def search_again(self, state, images):
        del state, images
        self.searched.append(self.place.number)
        return next(self.shares)

    def round(self, state, images, number, *, joint):
        del images, joint
        return RoundReport(state.band, 0.1, 0.0, self.likelihood(number), state.band)

    def rounds(self, place=None):
        """How many were made against half maps."""
        blank = torch.zeros(4, 4, 4)
        poses = torch.eye(3).repeat(2, 1, 1), torch.zeros(2, 2), torch.arange(2)
        state = Reconstruction(*poses, [blank, blank], 2.0, Support(0.4))
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


def test_a_part_in_its_joint_rounds_makes_no_others():
    """As the symmetric part of a checkpoint of an older version."""
    told = Told(RefineConfig(), [], rising)
    assert told.rounds(Place(joint=1)) == 0
    assert told.searched == []
