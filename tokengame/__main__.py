"""The console script and `python -m tokengame`: nothing is imported before Ctrl-C is caught."""

import sys


def entry() -> None:
    """Run the command line and exit with its code."""
    try:
        from tokengame.cli.main import entry as run

        run()
    except KeyboardInterrupt:  # before a command runs
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    entry()
