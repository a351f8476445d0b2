"""`python -m tdabench`: the command line, if the script is not on the path."""

import sys

from tdabench.cli import main

if __name__ == "__main__":
    sys.exit(main())
