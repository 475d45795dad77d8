"""Mirror planes in maps."""

from __future__ import annotations

import pytest
import torch

from cryorecon.maps.align import mirror_map, rotate_map
from cryorecon.maps.mirror import mirror_score
from cryorecon.physics.fourier import crop_or_pad_centred
from cryorecon.physics.rotations import random_rotations


@pytest.mark.parametrize("box", [32, 31])
def test_a_map_with_its_mirror_image_has_a_plane(box, molecule_32, generator):
    molecule = crop_or_pad_centred(molecule_32, box, 3)
    both = molecule + mirror_map(molecule)
    rotation = random_rotations(1, generator)[0].to(both)
    turned = rotate_map(both, rotation, torch.tensor([1.0, -2.0, 0.5]))
    assert mirror_score(turned) > 0.85
    assert mirror_score(molecule) < 0.6
