"""`python -m cryorecon` is the `cryorecon` command."""

from cryorecon.cli.main import main

if __name__ == "__main__":
    main()
