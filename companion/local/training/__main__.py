"""`python -m companion.local.training FOLDER` trains the job in a folder."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m companion.local.training FOLDER")
    # Read when torch is loaded: threads that wait sleep. Spinning, on a machine that does other work too, they
    # take the time of those they wait for, and training slows by far more than that work costs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .run import main

    sys.exit(main(Path(sys.argv[1])))
