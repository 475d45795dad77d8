"""Rotations of space: random ones, uniform grids, exponential map and distances.

A rotation is a matrix A of shape (..., 3, 3) that takes reference to image coordinates (see
:mod:`cryorecon.conventions`).
"""

from __future__ import annotations

from functools import lru_cache

import healpix
import numpy as np
import torch
from torch import Tensor

from cryorecon.conventions import euler_to_matrix


def random_rotations(
    n: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Rotations drawn from the Haar measure, on the generator's device.

    A unit quaternion with Gaussian components is uniform on the 3-sphere (Shoemake 1992).

    Parameters
    ----------
    n : int
    generator : torch.Generator

    Returns
    -------
    Tensor, shape (n, 3, 3)
    """
    quaternions = torch.randn(n, 4, generator=generator, dtype=dtype, device=generator.device)
    return of_quaternions(torch.nn.functional.normalize(quaternions, dim=-1))


def of_quaternions(quaternions: Tensor) -> Tensor:
    """Rotation matrices, shape (..., 3, 3), of unit quaternions (x, y, z, w), shape (..., 4).

    Not by roma: that loads torch._dynamo, which takes a second of every command.
    """
    v, w = quaternions[..., :3], quaternions[..., 3:, None]
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    one = torch.eye(3, dtype=v.dtype, device=v.device)
    return one + 2 * (w * skew + skew @ skew)


def exp_map(vectors_rad: Tensor) -> Tensor:
    """Rotation matrices of rotation vectors (axis times angle in radians).

    Parameters
    ----------
    vectors_rad : Tensor, shape (..., 3)
        Differentiable everywhere, also at zero.
    """
    x, y, z = vectors_rad.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    if vectors_rad.device.type == "cpu":
        return torch.linalg.matrix_exp(skew)
    # matrix_exp waits for a device several times a call; Rodrigues' formula does not.
    angle = vectors_rad.norm(dim=-1)[..., None, None]
    sine, versine = torch.sinc(angle / torch.pi), torch.sinc(angle / (2 * torch.pi)).square() / 2
    one = torch.eye(3, dtype=skew.dtype, device=skew.device)
    return one + sine * skew + versine * (skew @ skew)


def log_map(rotations: Tensor) -> Tensor:
    """Rotation vectors, in radians and shorter than or equal to pi, of rotation matrices."""
    import roma  # loads torch._dynamo, which takes a second: only when needed

    return roma.rotmat_to_rotvec(rotations)


def geodesic_distance_deg(first: Tensor, second: Tensor) -> Tensor:
    """Angle in degrees of the rotation from one matrix to the other; shapes broadcast.

    Exact for tiny angles too: uses the chord ``|A - B| = 2 sqrt(2) sin(angle / 2)``.
    """
    chord = torch.linalg.matrix_norm(first - second) / (2 * 2**0.5)
    return torch.rad2deg(2 * torch.asin(chord.clamp(max=1.0)))


def mean_rotation(rotations: Tensor, shares: Tensor) -> Tensor:
    """Mean of rotations within some degrees of each other: the nearest one to the matrices' mean.

    Parameters
    ----------
    rotations : Tensor, shape (..., k, 3, 3)
    shares : Tensor, shape (..., k)
        Of each; they sum to one.

    Returns
    -------
    Tensor, shape (..., 3, 3)
        By two of Newton's steps to the polar factor (Higham 1986), which leave 1e-12 where all lie
        within 5 degrees.
    """
    mean = (shares[..., None, None] * rotations).sum(-3)
    for _ in range(2):
        mean = 1.5 * mean - 0.5 * mean @ mean.mT @ mean
    return mean


def so3_grid(nside: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, int]:
    """Uniform grid of rotations: HEALPix viewing directions times equispaced in-plane angles.

    RELION's HEALPix order o is ``nside = 2**o``: order 2 is 192 directions x 24 in-plane angles,
    15 degrees apart; an `nside` between powers of two is allowed (Gorski et al. 2005, ring order).

    Parameters
    ----------
    nside : int
        The grid's step is about 60 / nside degrees; it has ``72 nside^3`` rotations.

    Returns
    -------
    rotations : Tensor, shape (12 nside^2 * 6 nside, 3, 3)
        The in-plane angle runs fastest.
    n_inplane : int
    """
    tilt, rot = healpix.pix2ang(nside, np.arange(12 * nside**2))
    n_inplane = 6 * nside
    psi = torch.arange(n_inplane, dtype=dtype) * (360.0 / n_inplane)
    views = torch.stack([torch.as_tensor(rot, dtype=dtype), torch.as_tensor(tilt, dtype=dtype)], -1)
    views = torch.rad2deg(views)[:, None, :].expand(-1, n_inplane, -1)
    angles = torch.cat([views, psi.expand(views.shape[0], -1)[..., None]], -1)
    return euler_to_matrix(angles.reshape(-1, 3)), n_inplane


@lru_cache(maxsize=4)
def so3_grid_on(nside: int, device: torch.device) -> Tensor:
    """Rotations of :func:`so3_grid` in single precision on a device, kept: not to be changed."""
    return so3_grid(nside, torch.float32)[0].to(device)


def grid_step_deg(nside: int) -> float:
    """Angle between neighbours of :func:`so3_grid` in degrees."""
    return 60.0 / nside


def sample_views(
    n: int, n_clusters: int, concentration: float, generator: torch.Generator
) -> Tensor:
    """Viewing directions from a mixture of von Mises-Fisher distributions on the sphere.

    Centres are uniform and equally likely. The cosine to the centre has density proportional to
    ``exp(concentration * cosine)`` and is drawn by inverting its distribution (Ulrich 1984).

    Parameters
    ----------
    n, n_clusters : int
    concentration : float
        kappa; 0 is uniform.

    Returns
    -------
    Tensor, shape (n, 3), float64
        Unit vectors.
    """

    def normal(count: int) -> Tensor:
        return torch.randn(count, 3, generator=generator, dtype=torch.float64)

    centres = torch.nn.functional.normalize(normal(n_clusters), dim=-1)
    chosen = centres[torch.randint(n_clusters, (n,), generator=generator)]
    uniform = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    if concentration < 1e-6:
        cosine = 2 * uniform - 1
    else:
        floor = torch.exp(torch.tensor(-2.0 * concentration, dtype=torch.float64))
        cosine = 1 + torch.log(uniform + (1 - uniform) * floor) / concentration
    tangent = torch.linalg.cross(chosen, normal(n))
    tangent = torch.nn.functional.normalize(tangent, dim=-1)
    return cosine * chosen + (1 - cosine**2).clamp(min=0).sqrt() * tangent


def rotations_towards(views: Tensor, generator: torch.Generator) -> Tensor:
    """Rotations A whose viewing direction (third row) is given, with random in-plane angles.

    Parameters
    ----------
    views : Tensor, shape (n, 3)
        Unit vectors in the reference frame.
    """
    rot = torch.rad2deg(torch.atan2(views[:, 1], views[:, 0]))
    tilt = torch.rad2deg(torch.acos(views[:, 2].clamp(-1, 1)))
    psi = 360 * torch.rand(len(views), generator=generator, dtype=views.dtype)
    return euler_to_matrix(torch.stack([rot, tilt, psi], -1))
