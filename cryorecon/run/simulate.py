"""Simulated particle stacks with known poses, streamed to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cryorecon.conventions import matrix_to_euler
from cryorecon.errors import CryoreconError
from cryorecon.io.atoms import read_atoms
from cryorecon.io.mrc import read_map, stack_writer, write_map
from cryorecon.io.star import write_star
from cryorecon.physics.ctf import CtfParameters, ctf
from cryorecon.physics.fourier import half_plane, resample_volume, to_images
from cryorecon.physics.imaging import predict
from cryorecon.physics.potential import potential_map
from cryorecon.physics.projection import Transform, padded_transform
from cryorecon.physics.rotations import random_rotations, rotations_towards, sample_views

_BLOCK = 256
_PADDING = 3


@dataclass(frozen=True)
class SimulateConfig:
    """What to simulate; lengths in angstrom, angles in degrees.

    Attributes
    ----------
    snr : float
        Variance of the CTF-modulated signal over the whole box, over the variance of the noise.
        Infinity leaves the noise out.
    shift_angst : float
        Origins are uniform within +- this along x and y.
    view_clusters, view_concentration
        0 clusters: directions uniform on the sphere. Else a mixture of that many von
        Mises-Fisher distributions of this concentration around random centres.
    noise_falloff_angst : float
        0: white noise. Else its power falls as ``1 / (1 + (s * falloff)^2)`` with spatial
        frequency s, at the same variance.
    b_factor_angst2 : float or None
        One B-factor for all atoms; None keeps the model's own.
    """

    n_particles: int = 2000
    box: int = 64
    pixel_size_angst: float | None = None
    snr: float = 0.1
    defocus_min_angst: float = 10_000.0
    defocus_max_angst: float = 20_000.0
    astigmatism_angst: float = 300.0
    phase_shift_deg: float = 0.0
    shift_angst: float = 0.0
    view_clusters: int = 0
    view_concentration: float = 10.0
    noise_falloff_angst: float = 0.0
    voltage_kv: float = 300.0
    spherical_aberration_mm: float = 2.7
    amplitude_contrast: float = 0.1
    b_factor_angst2: float | None = 20.0
    keep_hydrogens: bool = False
    keep_waters: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_particles < 1:
            raise CryoreconError("The number of particles must be at least 1", "Raise --n")
        if self.box < 8:
            raise CryoreconError(f"A box of {self.box} px is too small", "Use --box 8 or more")
        if not self.snr > 0:
            raise CryoreconError(f"The SNR must be positive, not {self.snr}", "Use --snr 0.1, say")
        if not 0 <= self.amplitude_contrast <= 1:
            raise CryoreconError(
                f"The amplitude contrast must lie in [0, 1], not {self.amplitude_contrast}",
                "Use --amplitude-contrast 0.1, say",
            )
        if self.defocus_min_angst > self.defocus_max_angst:
            raise CryoreconError(
                "The least defocus exceeds the largest", "Swap --defocus-min and --defocus-max"
            )


def load_model(path: str | Path, config: SimulateConfig) -> tuple[Tensor, float]:
    """The true map on the simulation's grid and its pixel size in angstrom.

    Atomic models become potentials; an MRC map is resampled to the box in Fourier space.
    """
    if Path(path).suffix.lower() in (".mrc", ".map", ".ccp4"):
        source = read_map(path)
        volume = torch.from_numpy(source.data)
        field_of_view = source.pixel_size_angst * len(volume)
        pixel_size = field_of_view / config.box
        wanted = config.pixel_size_angst
        if wanted is not None and abs(wanted - pixel_size) > 1e-3 * pixel_size:
            raise CryoreconError(
                f"{path} is {field_of_view:.1f} A wide, so a box of {config.box} px has "
                f"{pixel_size:.4f} A/px, not {wanted:g}",
                f"Leave --pixel-size out, or use --box {round(field_of_view / wanted)}",
            )
        return resample_volume(volume.double(), config.box).float(), pixel_size
    atoms = read_atoms(
        path,
        keep_hydrogens=config.keep_hydrogens,
        keep_waters=config.keep_waters,
        b_factor_angst2=config.b_factor_angst2,
    )
    pixel_size = config.pixel_size_angst or round(2.6 * atoms.radius_angst() / config.box, 2)
    return potential_map(atoms, config.box, pixel_size), pixel_size


@dataclass(frozen=True)
class _Truth:
    rotations: Tensor
    origins_angst: Tensor
    optics: CtfParameters


def _generators(seed: int) -> Iterator[torch.Generator]:
    """One generator per purpose, so that one more option does not change the others' draws."""
    children = np.random.SeedSequence(seed).spawn(3)
    for child in children:
        yield torch.Generator().manual_seed(int(child.generate_state(1)[0]))


def _draw_truth(config: SimulateConfig, poses: torch.Generator, optics: torch.Generator) -> _Truth:
    n = config.n_particles

    def uniform(low: float, high: float, generator: torch.Generator) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    if config.view_clusters:
        views = sample_views(n, config.view_clusters, config.view_concentration, poses)
        rotations = rotations_towards(views, poses)
    else:
        rotations = random_rotations(n, poses)
    reach = config.shift_angst
    origins = torch.stack([uniform(-reach, reach, poses), uniform(-reach, reach, poses)], -1)
    mean = uniform(config.defocus_min_angst, config.defocus_max_angst, optics)
    half_difference = uniform(0, config.astigmatism_angst, optics) / 2
    same = torch.ones(n, dtype=torch.float64)
    parameters = CtfParameters(
        mean + half_difference,
        mean - half_difference,
        uniform(-90, 90, optics),
        same * config.voltage_kv,
        same * config.spherical_aberration_mm,
        same * config.amplitude_contrast,
        same * config.phase_shift_deg,
        same * 0,
    )
    return _Truth(rotations, origins, parameters)


def _clean_images(
    transform: Transform, truth: _Truth, rows: slice, box: int, pixel_size_angst: float
) -> Tensor:
    plane = half_plane(box)
    gain = ctf(plane.frequencies, truth.optics[rows], box, pixel_size_angst).float()
    offsets = (truth.origins_angst[rows] / pixel_size_angst).float()
    rotations = truth.rotations[rows].float()
    return to_images(predict(transform, rotations, offsets, gain, plane), plane)


def _noise(
    shape: tuple[int, ...],
    config: SimulateConfig,
    pixel_size_angst: float,
    generator: torch.Generator,
) -> Tensor:
    """Noise of variance 1."""
    noise = torch.randn(shape, generator=generator)
    if config.noise_falloff_angst <= 0:
        return noise
    box = shape[-1]
    ky = torch.fft.fftfreq(box, pixel_size_angst)[:, None]
    kx = torch.fft.rfftfreq(box, pixel_size_angst)
    power = 1 / (1 + (kx**2 + ky**2) * config.noise_falloff_angst**2)
    both = torch.fft.fftfreq(box, pixel_size_angst)
    total = 1 / (1 + (both**2 + both[:, None] ** 2) * config.noise_falloff_angst**2)
    gain = (power / total.mean()).sqrt()
    return torch.fft.irfft2(torch.fft.rfft2(noise) * gain, s=(box, box))


def simulate(
    model: str | Path,
    output: str | Path,
    config: SimulateConfig,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``particles.mrcs``, ``particles.star`` (true poses, RELION 3.1) and ``map.mrc``.

    Images stream to disk in blocks, so memory does not grow with their number beyond the table.

    Parameters
    ----------
    model : path
        PDB, mmCIF (both also gzipped) or MRC file.
    output : path
        Folder, made if missing.
    progress : callable, optional
        Called with (images done, images in all).
    """
    output = Path(output)
    volume, pixel_size = load_model(model, config)
    output.mkdir(parents=True, exist_ok=True)
    pose_draws, optics_draws, noise_draws = _generators(config.seed)
    truth = _draw_truth(config, pose_draws, optics_draws)
    transform = padded_transform(volume, _PADDING)
    n, box = config.n_particles, config.box
    sample = _clean_images(transform, truth, slice(0, min(n, 512)), box, pixel_size)
    noise_std = float(sample.var() / config.snr) ** 0.5
    with stack_writer(output / "particles.mrcs", box, pixel_size) as stack:
        for start in range(0, n, _BLOCK):
            rows = slice(start, min(start + _BLOCK, n))
            images = _clean_images(transform, truth, rows, box, pixel_size)
            images += noise_std * _noise(tuple(images.shape), config, pixel_size, noise_draws)
            stack.append(images.numpy())
            if progress is not None:
                progress(rows.stop, n)
        # The table goes first: a stack without its table would look whole.
        write_star(output / "particles.star", _tables(truth, output, config, pixel_size))
    write_map(output / "map.mrc", volume.numpy(), pixel_size)


def _tables(
    truth: _Truth, output: Path, config: SimulateConfig, pixel_size_angst: float
) -> dict[str, pd.DataFrame]:
    optics = {
        "rlnOpticsGroupName": "opticsGroup1",
        "rlnOpticsGroup": 1,
        "rlnVoltage": config.voltage_kv,
        "rlnSphericalAberration": config.spherical_aberration_mm,
        "rlnAmplitudeContrast": config.amplitude_contrast,
        "rlnImagePixelSize": pixel_size_angst,
        "rlnImageSize": config.box,
        "rlnImageDimensionality": 2,
    }
    angles = matrix_to_euler(truth.rotations).numpy()
    stack = (output / "particles.mrcs").as_posix()
    n = config.n_particles
    particles = {
        "rlnImageName": [f"{i + 1:06d}@{stack}" for i in range(n)],
        "rlnMicrographName": "simulated",
        "rlnOpticsGroup": 1,
        "rlnDefocusU": truth.optics.defocus_u_angst.numpy(),
        "rlnDefocusV": truth.optics.defocus_v_angst.numpy(),
        "rlnDefocusAngle": truth.optics.defocus_angle_deg.numpy(),
        "rlnPhaseShift": truth.optics.phase_shift_deg.numpy(),
        "rlnAngleRot": angles[:, 0],
        "rlnAngleTilt": angles[:, 1],
        "rlnAnglePsi": angles[:, 2],
        "rlnOriginXAngst": truth.origins_angst[:, 0].numpy(),
        "rlnOriginYAngst": truth.origins_angst[:, 1].numpy(),
    }
    return {"optics": pd.DataFrame([optics]), "particles": pd.DataFrame(particles)}
