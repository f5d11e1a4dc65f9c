"""`python -m language_self_play` is `lsp`."""

import os
import sys

from language_self_play.cli import main

if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:
        # A rank has nothing left to do, and torch's threads, torn down, at times abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
