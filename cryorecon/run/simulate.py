"""Simulated particle stacks with known poses, streamed to disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cryorecon.conventions import matrix_to_euler
from cryorecon.errors import CryoreconError
from cryorecon.io.files import make_folder
from cryorecon.io.mrc import stack_writer, write_map
from cryorecon.io.star import write_star
from cryorecon.physics.ctf import CtfParameters, ctf
from cryorecon.physics.fourier import (
    HalfPlane,
    half_plane,
    to_images,
)
from cryorecon.physics.imaging import predict
from cryorecon.physics.projection import Transform, padded_transform
from cryorecon.physics.rotations import random_rotations, rotations_towards, sample_views
from cryorecon.run.simulate_config import SimulateConfig
from cryorecon.run.specimen import load_model

_SNR_SAMPLE = 512
# Images go through in blocks of at most this many images and interpolated coefficients, so that
# a block takes about 100 MB whatever the box.
_BLOCK_IMAGES = 256
_BLOCK_COEFFICIENTS = 2**19
# The oversampled transform is as fine as this side allows, at least 2 and at most 4 times.
_TRANSFORM_SIDE = 320


@dataclass(frozen=True)
class _Scene:
    """All that the noise-free images follow from."""

    transform: Transform
    plane: HalfPlane
    pixel_size_angst: float
    rotations: Tensor
    origins_angst: Tensor
    optics: CtfParameters

    def images(self, rows: slice) -> Tensor:
        """Noise-free images, shape (b, N, N), float32."""
        frequencies, box = self.plane.frequencies, self.plane.box
        gain = ctf(frequencies, self.optics[rows], box, self.pixel_size_angst).float()
        offsets = (self.origins_angst[rows] / self.pixel_size_angst).float()
        rotations = self.rotations[rows].float()
        return to_images(predict(self.transform, rotations, offsets, gain, self.plane), self.plane)

    def blocks(self, n: int) -> Iterator[slice]:
        """The first n rows in blocks whose size depends on the box alone."""
        size = min(max(_BLOCK_COEFFICIENTS // len(self.plane), 1), _BLOCK_IMAGES)
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    def signal_variance(self) -> float:
        """Variance of all pixels of the first images taken together."""
        n = min(len(self.rotations), _SNR_SAMPLE)
        total = squares = 0.0
        for rows in self.blocks(n):
            images = self.images(rows).double()
            total += float(images.sum())
            squares += float(images.square().sum())
        pixels = n * self.plane.box**2
        return squares / pixels - (total / pixels) ** 2


def _set_scene(
    volume: Tensor, pixel_size_angst: float, config: SimulateConfig, seeds: list[int]
) -> _Scene:
    box, n = len(volume), config.n_particles
    side_angst = box * pixel_size_angst
    if config.shift_angst > side_angst / 2:
        raise CryoreconError(
            f"Particles {config.shift_angst:g} A off the middle do not lie in images "
            f"{side_angst:.4g} A wide",
            f"Give --offset-range of {side_angst / 2:.4g} at most, or a larger --box",
        )
    # One generator per purpose: an option changes no draws but its own.
    views, origins, optics = (torch.Generator().manual_seed(seed) for seed in seeds)
    if config.view_clusters:
        directions = sample_views(n, config.view_clusters, config.view_concentration, views)
        rotations = rotations_towards(directions, views)
    else:
        rotations = random_rotations(n, views)
    shifts = torch.rand(n, 2, generator=origins, dtype=torch.float64) * 2 - 1
    padding = min(max(_TRANSFORM_SIDE // box, 2), 4)
    return _Scene(
        padded_transform(volume, padding),
        half_plane(box),
        pixel_size_angst,
        rotations,
        shifts * config.shift_angst,
        _draw_optics(config, optics),
    )


def _draw_optics(config: SimulateConfig, generator: torch.Generator) -> CtfParameters:
    def uniform(low: float, high: float) -> Tensor:
        draws = torch.rand(config.n_particles, generator=generator, dtype=torch.float64)
        return low + (high - low) * draws

    mean = uniform(config.defocus_min_angst, config.defocus_max_angst)
    half_difference = uniform(0, config.astigmatism_angst) / 2
    angle = uniform(-90, 90)
    one = torch.ones_like(mean)
    return CtfParameters(
        defocus_u_angst=mean + half_difference,
        defocus_v_angst=mean - half_difference,
        defocus_angle_deg=angle,
        voltage_kv=one * config.voltage_kv,
        spherical_aberration_mm=one * config.spherical_aberration_mm,
        amplitude_contrast=one * config.amplitude_contrast,
        phase_shift_deg=one * config.phase_shift_deg,
        b_factor_angst2=one * 0,
        phase_flipped=one * 0,
    )


def noise_gain(box: int, pixel_size_angst: float, falloff_angst: float) -> Tensor:
    """Gain of white noise in Fourier space that makes its power ``1 / (1 + (s * falloff)^2)``.

    Returns
    -------
    Tensor, shape (N, N // 2 + 1)
        In the layout of ``rfft2``; the variance stays as it is.
    """
    s = torch.fft.fftfreq(box, pixel_size_angst, dtype=torch.float64)
    power = 1 / (1 + (s**2 + s[:, None] ** 2) * falloff_angst**2)
    return (power / power.mean()).sqrt()[:, : box // 2 + 1].float()


def simulate(
    model: str | Path,
    output: str | Path,
    config: SimulateConfig,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``particles.mrcs``, ``particles.star`` (true poses, RELION 3.1) and ``map.mrc``.

    Images stream to disk in blocks, so memory does not grow with their number beyond the table.
    They are made by :mod:`cryorecon.physics.imaging`, white on black, with the map's transform
    oversampled up to four times. The three files appear together when all is done. One seed gives
    the same poses, optics and noise whatever the block size.

    Parameters
    ----------
    model : path
        PDB, mmCIF (both also gzipped) or MRC file.
    output : path
        Folder, made if missing; files of these names in it are replaced.
    progress : callable, optional
        Called with (images done, images in all).

    Raises
    ------
    CryoreconError
        If the model cannot be read or does not fit the box, its map has no contrast, or the
        folder cannot be written.
    """
    output, n = Path(output), config.n_particles
    stack_name = _name_in_star(output / "particles.mrcs")
    volume, pixel_size = load_model(model, config)
    *seeds, noise_seed = np.random.SeedSequence(config.seed).spawn(4)
    draws = [int(seed.generate_state(1, np.uint64)[0] >> 1) for seed in seeds]
    scene = _set_scene(volume, pixel_size, config, draws)
    variance = scene.signal_variance()
    if not variance > 0:
        raise CryoreconError(f"The images of {model} have no contrast", "Give another model")
    noise_std = math.sqrt(variance / config.snr)
    noise_draws = np.random.default_rng(noise_seed)
    box = len(volume)
    gain = noise_gain(box, pixel_size, config.noise_falloff_angst)
    with _together(output) as folder:
        with stack_writer(folder / "particles.mrcs", box, pixel_size) as stack:
            for rows in scene.blocks(n):
                images = scene.images(rows)
                # numpy's normal deviates run on from call to call, torch's depend on the block.
                shape = tuple(images.shape)
                noise = torch.from_numpy(noise_draws.standard_normal(shape, dtype=np.float32))
                if config.noise == "coloured":
                    noise = torch.fft.irfft2(torch.fft.rfft2(noise) * gain, s=(box, box))
                stack.append((images + noise_std * noise).numpy())
                if progress is not None:
                    progress(rows.stop, n)
        write_map(folder / "map.mrc", volume.numpy(), pixel_size)
        write_star(folder / "particles.star", _tables(scene, stack_name, config))


def _name_in_star(stack: Path) -> str:
    """The stack's path as given; relative to the current directory where it lies below it."""
    if stack.is_absolute() and stack.is_relative_to(Path.cwd()):
        stack = stack.relative_to(Path.cwd())
    name = stack.as_posix()
    if any(character.isspace() for character in name):
        raise CryoreconError(
            f"The path {name!r} holds white space, which RELION's tables cannot",
            "Choose another folder, or change into it and give a relative one",
        )
    return name


@contextmanager
def _together(output: Path) -> Iterator[Path]:
    """A hidden folder in `output` whose files move there when the block ends well."""
    existed = output.is_dir()
    try:
        make_folder(output)
        with TemporaryDirectory(prefix=".simulate-", dir=output) as name:
            yield Path(name)
            for file in sorted(Path(name).iterdir()):
                file.replace(output / file.name)
            existed = True
    except OSError as error:
        raise CryoreconError(
            f"{output} cannot be written: {error.strerror or error}", "Choose another folder"
        ) from error
    finally:
        if not existed and output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _tables(scene: _Scene, stack_name: str, config: SimulateConfig) -> dict[str, pd.DataFrame]:
    optics = {
        "rlnOpticsGroupName": "opticsGroup1",
        "rlnOpticsGroup": 1,
        "rlnVoltage": config.voltage_kv,
        "rlnSphericalAberration": config.spherical_aberration_mm,
        "rlnAmplitudeContrast": config.amplitude_contrast,
        "rlnImagePixelSize": scene.pixel_size_angst,
        "rlnImageSize": scene.plane.box,
        "rlnImageDimensionality": 2,
    }
    angles = matrix_to_euler(scene.rotations).numpy()
    particles = {
        "rlnImageName": [f"{i + 1:06d}@{stack_name}" for i in range(config.n_particles)],
        "rlnMicrographName": "simulated",
        "rlnOpticsGroup": 1,
        "rlnDefocusU": scene.optics.defocus_u_angst.numpy(),
        "rlnDefocusV": scene.optics.defocus_v_angst.numpy(),
        "rlnDefocusAngle": scene.optics.defocus_angle_deg.numpy(),
        "rlnPhaseShift": scene.optics.phase_shift_deg.numpy(),
        "rlnAngleRot": angles[:, 0],
        "rlnAngleTilt": angles[:, 1],
        "rlnAnglePsi": angles[:, 2],
        "rlnOriginXAngst": scene.origins_angst[:, 0].numpy(),
        "rlnOriginYAngst": scene.origins_angst[:, 1].numpy(),
    }
    return {"optics": pd.DataFrame([optics]), "particles": pd.DataFrame(particles)}
