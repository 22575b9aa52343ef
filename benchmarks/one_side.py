"""One side of benchmarks/beside_trl.py, which starts it, in a process of its own. Ours imports as the command line
does, with the collector at rest; TRL's as a script of its users would."""

import sys
from contextlib import nullcontext

from reasoner.garbage import importing

if __name__ == "__main__":
    with nullcontext() if "trl" in sys.argv[sys.argv.index("--side") + 1] else importing():
        from benchmarks.beside_trl import read_arguments, run_side
        from benchmarks.common import run_and_leave
    asked = read_arguments()
    run_and_leave(lambda: run_side(asked))
