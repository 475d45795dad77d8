"""RELION 3.1's commands for an initial model and for the refinement that follows it."""

from pathlib import Path

SCHEDULES = {
    "default": {"ini": 50, "inbetween": 200, "fin": 50, "from": 100, "to": 500},
    "short": {"ini": 25, "inbetween": 50, "fin": 25, "from": 100, "to": 200},
}


def initial_model(star: Path, out: Path, schedule: str, diameter_angst: float) -> list[str]:
    s = SCHEDULES[schedule]
    return (
        f"relion_refine --o {out}/{schedule} --i {star} --ctf --K 1 --sym C1 --denovo_3dref --sgd "
        f"--sgd_ini_iter {s['ini']} --sgd_inbetween_iter {s['inbetween']} --sgd_fin_iter {s['fin']}"
        f" --sgd_ini_resol 25 --sgd_fin_resol 8 --sgd_ini_subset {s['from']} "
        f"--sgd_fin_subset {s['to']} --sgd_write_iter 50 --flatten_solvent --zero_mask "
        f"--dont_check_norm --dont_combine_weights_via_disc --preread_images --pool 3 --pad 2 "
        f"--particle_diameter {diameter_angst} --oversampling 1 --healpix_order 1 "
        f"--offset_range 2 --offset_step 2 --j 2 --random_seed 1"
    ).split()


def refinement(star: Path, model: Path, out: Path, name: str, diameter_angst: float) -> list[str]:
    """Gold-standard refinement; needs the MPI program, one idle leader and a process a half set."""
    return (
        f"mpirun --allow-run-as-root --oversubscribe -n 3 relion_refine_mpi --o {out}/{name} "
        f"--i {star} --ref {model} --ini_high 15 --auto_refine --split_random_halves --ctf "
        f"--sym C1 --flatten_solvent --zero_mask --norm --scale --dont_combine_weights_via_disc "
        f"--preread_images --pool 3 --pad 2 --particle_diameter {diameter_angst} --oversampling 1 "
        f"--healpix_order 2 --auto_local_healpix_order 4 --offset_range 2 --offset_step 2 "
        f"--low_resol_join_halves 40 --j 1 --random_seed 1"
    ).split()


def last(out: Path, prefix: str, suffix: str) -> Path:
    return sorted(out.glob(f"{prefix}_it*_{suffix}"))[-1]
