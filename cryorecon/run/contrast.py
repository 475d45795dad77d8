"""Whether particles are white or black, told to the log."""

from __future__ import annotations

from cryorecon.engines.contrast import SURE, Contrast, contrast_score
from cryorecon.engines.observations import ImageSet
from cryorecon.run.job import Job


def set_contrast(job: Job, images: ImageSet, diameter: float, contrast: Contrast) -> None:
    """Make particles white, and say what was found.

    Parameters
    ----------
    diameter : float
        Of the particle, as a fraction of the box side.
    contrast : "auto", "white" or "black"
        As the images tell, or as the user does.
    """
    score = contrast_score(images, diameter)
    seen = "white on black" if score > 0 else "BLACK ON WHITE"
    # Nor if it is NaN.
    if not abs(score) >= SURE:
        job.say(f"contrast cannot be told from the images ({score:.1f} standard errors)")
        seen = "white on black"
    else:
        job.say(f"particles look {seen} ({abs(score):.0f} standard errors)")
    if contrast != "auto":
        given = "white on black" if contrast == "white" else "BLACK ON WHITE"
        if given != seen:
            job.say(f"WARNING: they are taken as {given}, as --contrast says")
        seen = given
    if seen != "white on black":
        job.say("the CTF is inverted for the reconstruction; the map will be white on black")
        images.gain.neg_()
