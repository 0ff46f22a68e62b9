"""`python -m compactattn`."""

import sys

from compactattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
