"""`python -m mmdiff`, which is what launchers start."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # the working directory: a torch.py in it must not stand in for torch
    from mmdiff.cli.app import main

    main()
