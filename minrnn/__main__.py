"""`python -m minrnn` is the command `minrnn`."""

import sys

from minrnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
