"""Whether particles are white or black, and what outshines them, told to the log."""

from __future__ import annotations

from dataclasses import replace

import torch

from cryorecon.engines.contrast import SURE, Contrast, FirstLook
from cryorecon.engines.observations import ImageSet
from cryorecon.run.job import Job

_WHITE, _BLACK = "white on black", "BLACK ON WHITE"


def first_look(job: Job, images: ImageSet, diameter: float, contrast: Contrast) -> ImageSet:
    """Make particles white, dim what outshines them, and say what was found.

    Parameters
    ----------
    diameter : float
        Of the particle, as a fraction of the box side.
    contrast : "auto", "white" or "black"
        As the images tell, each optics group for itself, or as the user does.

    Returns
    -------
    ImageSet
        Their gain is changed in place.
    """
    look = FirstLook.at(images, diameter)
    dimming = look.dimming()
    n_bright = int((dimming < 1).sum())
    if n_bright:
        look = replace(look, scores=look.scores * dimming)
        images = replace(images, dimming=dimming.to(images.gain.dtype))
        job.say(
            f"WARNING: {bright_text(n_bright, len(images))}; they are dimmed. Take them out: "
            "rlnParticleFigureOfMerit in run_data.star is less than 1"
        )
    _set_contrast(job, images, look, contrast)
    return images


def _set_contrast(job: Job, images: ImageSet, look: FirstLook, contrast: Contrast) -> None:
    score = look.score()
    white, black = look.sure_groups(images.group)
    if contrast == "auto" and white and black:
        job.say(f"WARNING: {differing_text(white, black)}; the CTF of these is inverted")
        rows = torch.isin(images.group, torch.tensor(black, dtype=images.group.dtype))
        images.gain[rows] = -images.gain[rows]
        return
    seen = _WHITE if score > 0 else _BLACK
    # Nor if it is NaN.
    if not abs(score) >= SURE:
        job.say(f"contrast cannot be told from the images ({score:.1f} standard errors)")
        seen = _WHITE
    else:
        job.say(f"particles look {seen} ({abs(score):.0f} standard errors)")
    if contrast != "auto":
        given = _WHITE if contrast == "white" else _BLACK
        if given != seen:
            job.say(f"WARNING: they are taken as {given}, as --contrast says")
        seen = given
    if seen != _WHITE:
        job.say("the CTF is inverted for the reconstruction; the map will be white on black")
        images.gain.neg_()


def bright_text(n_bright: int, total: int) -> str:
    """That some images outshine the others."""
    return (
        f"{n_bright} of {total} images are much brighter than the others, as ice, carbon and "
        "aggregates are"
    )


def differing_text(white: list[int], black: list[int]) -> str:
    """How the contrast of optics groups, numbered from 0, differs."""
    return f"particles look {_WHITE} in {_groups(white)} and {_BLACK} in {_groups(black)}"


def _groups(numbers: list[int]) -> str:
    """Optics groups by their places in the table, the first few."""
    some = ", ".join(str(number + 1) for number in numbers[:3])
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"optics group{'s' * (len(numbers) > 1)} {some}{more}"
