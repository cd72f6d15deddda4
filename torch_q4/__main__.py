"""``python -m torch_q4``: the command line."""

import sys

from torch_q4.cli import main

if __name__ == "__main__":
    sys.exit(main())
