"""`python -m mint` and `accelerate launch -m mint`: the same as the `mint` command."""

import sys

from mint.cli import main

if __name__ == "__main__":
    sys.exit(main())
