"""RELION 3.1's commands for an initial model and for the refinement that follows it."""

from pathlib import Path


def initial_model(
    star: Path,
    out: Path,
    diameter_angst: float,
    *,
    resolutions_angst: tuple[float, float] = (35, 15),
    iterations: tuple[int, int, int] = (50, 200, 50),
    mini_batches: tuple[int, int] = (100, 500),
    offset_range_px: float = 6,
    threads: int = 1,
    seed: int = 0,
) -> list[str]:
    """Stochastic gradient descent from nothing, one class.

    The defaults are RELION's, iterations and sizes of mini-batches too. A seed of 0 would leave
    particles in the file's order.
    """
    first_angst, last_angst = resolutions_angst
    first, between, final = iterations
    small, large = mini_batches
    return (
        f"relion_refine --o {out}/run --i {star} --denovo_3dref --sgd --ctf --K 1 --sym C1 "
        f"--sgd_ini_iter {first} --sgd_inbetween_iter {between} --sgd_fin_iter {final} "
        f"--sgd_ini_resol {first_angst:g} --sgd_fin_resol {last_angst:g} "
        f"--sgd_ini_subset {small} --sgd_fin_subset {large} --sgd_write_iter 50 "
        f"--flatten_solvent --zero_mask --dont_check_norm --dont_combine_weights_via_disc "
        f"--preread_images --pool 3 --pad 2 "
        f"--particle_diameter {diameter_angst:g} --oversampling 1 --healpix_order 1 "
        f"--offset_range {offset_range_px:g} --offset_step 2 --j {threads} --random_seed {seed + 1}"
    ).split()


def refinement(
    star: Path,
    model: Path,
    out: Path,
    diameter_angst: float,
    *,
    low_pass_angst: float,
    local_from_order: int = 4,
    offset_range_px: float = 5,
    threads: int = 1,
    seed: int = 0,
) -> list[str]:
    """Gold-standard refinement; needs the MPI program, one idle leader and a process a half set.

    `local_from_order` is the HEALPix order from which on only rotations near the last one are
    tried: 4 (1.8 degrees with oversampling) in RELION's interface, 3 takes a fraction of the time.
    """
    return (
        f"mpirun --allow-run-as-root --oversubscribe -n 3 relion_refine_mpi --o {out}/run "
        f"--i {star} --ref {model} --ini_high {low_pass_angst:g} --auto_refine "
        f"--split_random_halves --ctf --sym C1 --flatten_solvent --zero_mask --norm --scale "
        f"--dont_combine_weights_via_disc --preread_images --pool 3 --pad 2 "
        f"--particle_diameter {diameter_angst:g} --oversampling 1 --healpix_order 2 "
        f"--auto_local_healpix_order {local_from_order} "
        f"--offset_range {offset_range_px:g} --offset_step 2 --low_resol_join_halves 40 "
        f"--j {threads} --random_seed {seed + 1}"
    ).split()


def last(out: Path, suffix: str) -> Path | None:
    """The latest iteration's file of a kind."""
    found = sorted(out.glob(f"run_it*_{suffix}"))
    return found[-1] if found else None
