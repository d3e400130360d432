"""`python -m mmdiff`, which is what launchers start."""

from mmdiff.cli import main

if __name__ == "__main__":
    main()
