"""Settings given on the command line or in a file."""

from __future__ import annotations

import dataclasses

import pytest

from cryorecon.engines.amortized import AmortizedConfig
from cryorecon.engines.moments.config import MomentFitConfig
from cryorecon.engines.mra.training import TrainingConfig
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.errors import CryoreconError
from cryorecon.run.settings import with_settings


def test_numbers_and_words_are_taken_as_the_field_is():
    config = with_settings(AmortizedConfig(), None, ["encoder_rate=3e-4", "batch=32", "loss=l2"])
    assert (config.encoder_rate, config.batch, config.loss) == (3e-4, 32, "l2")
    assert with_settings(MomentFitConfig(), None, ["volume=grid"]).volume == "grid"
    assert with_settings(TrainingConfig(), None, ["learning_rate=1e-5"]).learning_rate == 1e-5


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("iterations=[1", "not valid YAML"),
        ("iterations=.inf", "Give int"),
        ("iterations=2.5", "Give int"),
        ("iterations=many", "Give int"),
        ("iterations=true", "Give int"),
        ("starts.foo=1", "has no parts"),
        ("volume=foo", "beads, grid, rmfn, fouriernet"),
        ("rate=.nan", "Give float"),
        ("iterations", "no value"),
        ("bead=3", "beads"),
    ],
)
def test_settings_that_do_not_fit_are_told(pair, words):
    with pytest.raises(CryoreconError, match=words):
        with_settings(MomentFitConfig(), None, [pair])


COUNTS = {
    AmortizedConfig: ("batch", "heads", "images_seen"),
    RmfnConfig: ("search_images", "search_batch", "n_starts", "fine_images", "hard_images"),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_engines_need_positive_counts(kind):
    for name in COUNTS[kind]:
        with pytest.raises(CryoreconError, match=f"{name} must be positive"):
            with_settings(kind(), None, [f"{name}=0"])


@pytest.mark.parametrize("kind", COUNTS)
def test_no_number_of_an_engine_is_negative(kind):
    for field in dataclasses.fields(kind):
        value = getattr(kind(), field.name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # The limits of offsets are told in angstrom, with the images.
        if number and field.name not in ("offset_range", "farthest_offset"):
            with pytest.raises(CryoreconError, match=f"{field.name} must not be negative"):
                with_settings(kind(), None, [f"{field.name}=-1"])


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("temperatures=[]", "positive numbers"),
        ("temperatures=[1.0, 0]", "positive numbers"),
        ("search_nside=0", "must be positive"),
        ("memory=1.0", "less than 1"),
    ],
)
def test_numbers_that_no_search_can_use_are_refused(pair, words):
    with pytest.raises(CryoreconError, match=words):
        with_settings(RmfnConfig(), None, [pair])


def test_keys_of_a_file_may_be_no_words(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("1: 2\n")
    with pytest.raises(CryoreconError, match="Unknown setting 1"):
        with_settings(MomentFitConfig(), path, [])
