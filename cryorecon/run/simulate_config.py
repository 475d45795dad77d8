"""What to simulate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cryorecon.errors import CryoreconError

_ANY, _TINY = math.inf, 1e-9
# Option and limits of each number. Those of optics are what particle tables are read with.
_WITHIN = {
    "n_particles": ("--n", 1, _ANY),
    "box": ("--box", 8, 4096),
    "pixel_size_angst": ("--pixel-size", _TINY, _ANY),
    "defocus_min_angst": ("--defocus-min", -1e7, 1e7),
    "defocus_max_angst": ("--defocus-max", -1e7, 1e7),
    "astigmatism_angst": ("--astigmatism", 0, 1e6),
    "phase_shift_deg": ("--phase-shift", -1e6, 1e6),
    "shift_angst": ("--offset-range", 0, _ANY),
    "view_clusters": ("--view-clusters", 0, _ANY),
    "view_concentration": ("--view-concentration", 0, _ANY),
    "noise_falloff_angst": ("--noise-falloff", 0, _ANY),
    "voltage_kv": ("--voltage", 1, 2000),
    "spherical_aberration_mm": ("--cs", -1e3, 1e3),
    "amplitude_contrast": ("--amplitude-contrast", 0, 1),
    "b_factor_angst2": ("--b-factor", 0, _ANY),
    "seed": ("--seed", 0, _ANY),
}


@dataclass(frozen=True)
class SimulateConfig:
    """What to simulate; lengths in angstrom, angles in degrees.

    Attributes
    ----------
    n_particles : int
    box : int or None
        Pixels a side; None is 64 for an atomic model, and for a map its own field of view.
    pixel_size_angst : float or None
        None: a map's own; for an atomic model such that it fills about 3/4 of the box.
    snr : float
        Variance of the CTF-modulated signal over the whole box, over the variance of the noise.
        The signal's variance is that of the pixels of the first 512 images, all taken together.
        Infinity leaves the noise out.
    defocus_min_angst, defocus_max_angst : float
        Mean defocus is uniform between them.
    astigmatism_angst : float
        Defocus U - V is uniform between 0 and this, its angle uniform in [-90, 90).
    phase_shift_deg : float
    shift_angst : float
        Origins are uniform within +- this along x and y.
    view_clusters, view_concentration
        0 clusters: directions uniform on the sphere. Else a mixture of that many von
        Mises-Fisher distributions of this concentration (kappa) around random centres.
    noise : "white" or "coloured"
    noise_falloff_angst : float
        The power of coloured noise falls as ``1 / (1 + (s * falloff)^2)`` with spatial frequency
        s; its variance is that of the white noise.
    voltage_kv, spherical_aberration_mm, amplitude_contrast : float
    b_factor_angst2 : float or None
        One B-factor for all atoms; None keeps the model's own (20 where that is not positive).
    keep_hydrogens, keep_waters : bool
    seed : int
        Directions, origins, optics and noise draw from it by generators of their own.
    """

    n_particles: int = 2000
    box: int | None = None
    pixel_size_angst: float | None = None
    snr: float = 0.1
    defocus_min_angst: float = 10_000.0
    defocus_max_angst: float = 20_000.0
    astigmatism_angst: float = 300.0
    phase_shift_deg: float = 0.0
    shift_angst: float = 0.0
    view_clusters: int = 0
    view_concentration: float = 10.0
    noise: Literal["white", "coloured"] = "white"
    noise_falloff_angst: float = 20.0
    voltage_kv: float = 300.0
    spherical_aberration_mm: float = 2.7
    amplitude_contrast: float = 0.1
    b_factor_angst2: float | None = None
    keep_hydrogens: bool = False
    keep_waters: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (flag, low, high) in _WITHIN.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                bound = f"between {low:g} and {high:g}" if high < _ANY else f"at least {low:g}"
                bound = "positive" if low == _TINY else bound
                bound = "finite" if value == math.inf and high == _ANY else bound
                raise CryoreconError(f"{flag} is {value:g}", f"It must be {bound}")
        if not self.snr > 0:
            raise CryoreconError(
                f"--snr is {self.snr:g}", "It must be positive; inf leaves the noise out"
            )
        if self.defocus_min_angst > self.defocus_max_angst:
            raise CryoreconError(
                f"--defocus-min {self.defocus_min_angst:g} exceeds "
                f"--defocus-max {self.defocus_max_angst:g}",
                "Swap them",
            )
        if self.noise not in ("white", "coloured"):
            raise CryoreconError(f"--noise is {self.noise!r}", "Use white or coloured")
