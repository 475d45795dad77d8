"""`python -m cryorecon` is the `cryorecon` command."""

import sys


def start() -> None:
    """Load the command line and run it: Ctrl-C ends it quietly from the first moment on."""
    try:
        from cryorecon.cli.main import main
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(3)
    main()


if __name__ == "__main__":
    start()
