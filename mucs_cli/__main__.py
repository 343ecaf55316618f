"""``python -m mucs_cli``, the same as ``mucs``."""

import sys

from mucs_cli.cli import main

if __name__ == "__main__":
    sys.exit(main())
