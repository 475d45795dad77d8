"""Table 1 and figure 4 of Khoo, Paul and Sharon 2024: multireference alignment in one dimension.

    python examples/reproduce/mra.py OUT [--full] [options of cryorecon mra reproduce]

Trains encoders for mixtures of 1, 2 and 3 Gaussians and tells their errors on unseen pairs, solves
the same noisy moments in every way there is, and refines trained and untrained encoders on them.
Small by default, some 25 minutes on one core; `--full` takes the paper's 1,750,000 pairs, 30,000
epochs and recipe. Tables are OUT/*.csv; finished trainings are kept and not repeated.
"""

import subprocess
import sys


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    command = [sys.executable, "-m", "cryorecon", "mra", "reproduce", "-o", *sys.argv[1:]]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
