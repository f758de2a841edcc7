import sys
from pathlib import Path

from .run import main

if len(sys.argv) != 2:
    sys.exit("usage: python -m companion.local.training FOLDER")
sys.exit(main(Path(sys.argv[1])))
