"""`python -m companion.local.training FOLDER` trains the job in a folder."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m companion.local.training FOLDER")
    # Threads that wait sleep (torch reads this when it is loaded). Threads that spin take the time of those
    # they wait for as soon as the machine has other work, and then training takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .run import main

    sys.exit(main(Path(sys.argv[1])))
