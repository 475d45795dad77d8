"""What an ab initio job leaves in its directory."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from cryorecon.conventions import matrix_to_euler
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import MANY_AT_LIMIT, Reconstruction, RefineConfig
from cryorecon.engines.rivals import MOST_IN_DOUBT
from cryorecon.io.mrc import write_map
from cryorecon.io.particles import Particles
from cryorecon.maps.failures import at_limit
from cryorecon.maps.fsc import MaskedFsc, crossing_shell, masked_fsc, without_mask_effect
from cryorecon.physics.fourier import max_band
from cryorecon.physics.masks import solvent_mask
from cryorecon.physics.resampling import resample_volume
from cryorecon.physics.symmetry import fold_of
from cryorecon.run.curves import FscCurve, write_fsc_star, write_fsc_xml
from cryorecon.run.job import Job, write_output_nodes
from cryorecon.run.plots import fsc_figure, map_figure, save_figure, viewing_direction_figure
from cryorecon.run.report.doubts import AT_LIMIT, farthest_searched

MAP, MASKED_MAP, MASK = (f"initial_model{kind}.mrc" for kind in ("", "_masked", "_mask"))
_HALVES_LABEL = {
    "independent": "independent half maps (gold standard)",
    "shared": "half maps split after a shared search",
}
# Images in doubt, and share of their other poses a turn away, from which on copies are told of. Of
# asymmetric particles less than a tenth lie there.
_MANY_IN_DOUBT, _MOST_COPIES = 0.1, 0.5
# What a mask's rim may ring by in a finer grid.
_NO_MASK = 0.01


def joint_map(state: Reconstruction) -> Tensor:
    """The map of all images, shape (N, N, N), on the device."""
    return (state.maps[0] + state.maps[1]) / 2


def size_text(particles: Particles) -> str:
    """Box and pixel size, as stored and as they are worked with."""
    stored = f"{particles.stored_box} px at {particles.stored_pixel_size_angst:g} A"
    if particles.crop_box is None:
        return stored
    pixel = particles.pixel_size_angst
    return f"{stored}, Fourier cropped to {particles.box} px at {pixel:g} A (see --box)"


def recorded_scale(images: ImageSet, particles: Particles) -> float:
    """Factor that brings maps onto the scale of the images on disk, in whose box they are written.

    Their projections, with CTF, are then what the images show: images were divided by their noise
    when they were normalised, and a finer grid has more voxels along each line.
    """
    return images.spread * particles.box / particles.stored_box


def scaled(state: Reconstruction, factor: float) -> Reconstruction:
    """The same with all its maps times a factor."""
    found = copy(state)
    found.maps = [volume * factor for volume in state.maps]
    found.halves = [volume * factor for volume in state.halves]
    return found


def in_full(volume: Tensor, particles: Particles) -> Tensor:
    """A map in the box of the particles as they are stored, on the CPU."""
    return resample_volume(volume.cpu(), particles.stored_box)


def write_in_full(job: Job, name: str, volume: Tensor, particles: Particles) -> None:
    """Write a map in the box of the particles as they are stored."""
    values = in_full(volume, particles).numpy()
    write_map(job.path(name), values, particles.stored_pixel_size_angst)


def report_poses(
    job: Job, state: Reconstruction, config: RefineConfig, particles: Particles
) -> None:
    """What the log says of the poses that were found."""
    report_offsets(job, state, config, particles)
    report_copies(job, state)


def report_offsets(
    job: Job, state: Reconstruction, config: RefineConfig, particles: Particles
) -> None:
    """How far off centre the particles were found, and how many as far as was searched."""
    pixel = particles.pixel_size_angst
    length = state.offsets_px.norm(dim=-1) * pixel
    limit = state.searched_to(config) * particles.box * pixel
    hits = int(at_limit(length, limit, pixel).sum())
    job.say(
        f"particles lie {float(length.median()):.1f} A off centre (median); {hits} of "
        f"{len(length)} at the limit of {limit:.1f} A"
    )
    if hits > MANY_AT_LIMIT * len(length):
        remedy = "give a larger --offset-range"
        if farthest_searched(limit, particles.box * pixel):
            remedy = (
                "such images, a quarter of the box or more off centre, are probably junk or "
                "neighbours, or need extraction anew, centred"
            )
        job.say(f"WARNING: {AT_LIMIT}; {remedy}")


def report_copies(job: Job, state: Reconstruction) -> None:
    """Whether images that may have another pose have it in a copy, as in a symmetric particle."""
    own = state.rotations if state.half_poses is None else state.half_poses[0]
    share, angle_deg = state.rivals.commonest_turn(own)
    if state.rivals.in_doubt() < _MANY_IN_DOUBT or share < _MOST_COPIES:
        return
    fold, remedy = fold_of(angle_deg), ""
    if fold is not None:
        angle_deg, remedy = 360 / fold, f" (--symmetry C{fold})"
    job.say(
        f"{100 * share:.0f} % of the other poses lie one turn of {angle_deg:.0f} degrees away, as "
        f"copies in a symmetric particle do, or in one that nearly is{remedy}"
    )


def write_first_poses(
    job: Job, particles: Particles, rotations: Tensor, offsets_px: Tensor
) -> None:
    """Poses as the encoder read them, where one encoder read all particles."""
    if len(rotations) == len(particles):
        particles.write(
            job.path("encoder_data.star"),
            euler_deg=matrix_to_euler(rotations.double()).numpy(),
            origins_angst=(offsets_px.double() * particles.pixel_size_angst).numpy(),
        )


def write_model(
    job: Job,
    volume: Tensor,
    pixel_size_angst: float,
    config: RefineConfig,
    *,
    ends: bool = False,
    mask: Tensor | None = None,
) -> dict[str, int]:
    """A job's map, a soft mask around its molecule, and the map inside this mask.

    The sphere about a molecule holds several times its volume in noise. Neither mask nor masked map
    where the molecule is not white on black.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
        White on black.
    pixel_size_angst : float
    config : RefineConfig
        Diameter, and detail of the mask.
    ends : bool
        The map ends at a resolution: it is not written inside the mask, which would put something
        beyond.
    mask : Tensor, shape (N, N, N), optional
        Around its molecule; default made of the map.

    Returns
    -------
    dict of str to int
        Names of the files and RELION's types of them.
    """
    volume = volume.cpu()
    if mask is None:
        mask = solvent_mask(volume, config.mask_band(volume.shape[-1]))
    white = float((volume - volume.mean()).pow(3).mean()) > 0
    if not white:
        job.say("the map is not white on black: no mask around its molecule")
    files = {MAP: (volume, 6), MASKED_MAP: (volume * mask, 6), MASK: (mask, 7)}
    wanted = [MAP, *([MASKED_MAP] * (white and not ends)), *([MASK] * white)]
    for name in wanted:
        write_map(job.path(name), files[name][0].numpy(), pixel_size_angst)
    return {name: files[name][1] for name in wanted}


def write_results(
    job: Job,
    particles: Particles,
    state: Reconstruction,
    scales: list[Tensor],
    halves: str,
    config: RefineConfig,
    merit: Tensor | None = None,
) -> None:
    """Maps, half maps, FSC, poses and pictures; says what it wrote.

    Parameters
    ----------
    merit : Tensor, shape (n,), optional
        Of images that were dimmed, less than 1.
    """
    pixel = particles.pixel_size_angst
    joint, likelihood = joint_map(state), state.log_likelihood
    whole = in_full(joint, particles)
    # In the smaller box: distances in a large one take its memory thirty times.
    mask = in_full(solvent_mask(joint, config.mask_band(particles.box)), particles).clamp(0, 1)
    mask = torch.where(mask < _NO_MASK, 0.0, mask)
    nodes = write_model(job, whole, particles.stored_pixel_size_angst, config, mask=mask)
    for number, volume in enumerate(scales, 1):
        write_in_full(job, f"scale{number}.mrc", volume, particles)
    particles.write(
        job.path("run_data.star"),
        euler_deg=matrix_to_euler(state.rotations.double()).numpy(),
        origins_angst=(state.offsets_px.double() * pixel).numpy(),
        random_subsets=(state.half + 1).numpy(),
        class_number=1,
        pose_share=state.rivals.own_share().numpy(),
        log_likelihood=likelihood.numpy() if bool((likelihood != 0).all()) else None,
        merit=None if merit is None else merit.numpy(),
    )
    nodes["run_data.star"] = 3
    written = [*nodes, "map.png", "views.png"]
    if halves != "none":
        _write_halves(job, state, particles, _HALVES_LABEL[halves])
        nodes["run_half1_class001_unfil.mrc"] = 10
        written[-2:-2] = ["fsc.star", "fsc.png"]
    save_figure(map_figure(joint.cpu().numpy(), pixel, MAP), job.path("map.png"))
    views = viewing_direction_figure(state.rotations, "run_data.star")
    save_figure(views, job.path("views.png"))
    write_output_nodes(job.folder, nodes)
    job.say("projections do not tell the hand: the mirror image of the map is as good")
    for name in written:
        job.say(f"{job.path(name)}")


def _masked_parts(state: Reconstruction) -> MaskedFsc:
    """The half maps' FSC, without what the sphere brings, nor what aligning noise would."""
    worn = state.support.on(state.halves[0].shape[-1], device=state.halves[0].device)
    one, other = state.halves
    found = masked_fsc(one, other, worn, torch.Generator().manual_seed(0))
    found = MaskedFsc(**{name: curve.cpu() for name, curve in vars(found).items()})
    corrected = without_mask_effect(state.fsc.to(found.masked), found.randomised)
    return replace(found, corrected=corrected, masked=state.fsc)


def _write_halves(job: Job, state: Reconstruction, particles: Particles, label: str) -> None:
    box, pixel = particles.box, particles.pixel_size_angst
    for number, volume in enumerate(state.halves, 1):
        write_in_full(job, f"run_half{number}_class001_unfil.mrc", volume, particles)
    aligned, parts = label == _HALVES_LABEL["independent"], _masked_parts(state)
    mask = "soft sphere of the diameter"
    if state.support.mask is not None:
        mask += " times --mask"
    doubt = state.rivals.in_doubt()
    unsure = not aligned and doubt > MOST_IN_DOUBT
    label += ", poses unsure" if unsure else ""
    curve = FscCurve(parts.corrected, box, pixel, label, mask, aligned, parts)
    write_fsc_star(job.path("fsc.star"), curve)
    write_fsc_xml(job.path("fsc.xml"), curve)
    save_figure(fsc_figure({label: curve}), job.path("fsc.png"))
    job.say(f"{label}: {curve.resolution_text(0.143)} ({curve.conditions})")
    if unsure:
        job.say(
            f"WARNING: {100 * doubt:.0f} % of the images may have another pose: half maps of a "
            "shared search then agree further than they are right; check the CTF columns and the "
            "pixel size first, and see the report"
        )
    if particles.crop_box and crossing_shell(curve.values, 0.143) > max_band(box) - 1:
        job.say(
            f"they agree as far as images of {box} px go, which these were cropped to: a larger "
            "--box may show finer detail"
        )
