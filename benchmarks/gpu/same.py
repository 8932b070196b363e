"""Whether two runs are one: their results.json, times left out.

python benchmarks/gpu/same.py A B [--near]     # to the bit, or within 3 points of ACC
python benchmarks/gpu/same.py --kill FOLDER    # ends the run that writes to this folder, wherever it stands
"""

import json
import os
import signal
import sys
from pathlib import Path


def end_those_writing_to(folder):
    """Kills what is left of the run with this output folder; says where it stood."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if "janus_ext.train" in words and folder in words:
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, UnicodeDecodeError):
            pass
    done = sorted(Path(folder, "checkpoints").glob("factors-*"))
    finished = "there: too late" if Path(folder, "results.json").exists() else "missing"
    print(f"cut off with {len(done)} tasks finished, results.json {finished}")
    return finished != "missing"


if sys.argv[1] == "--kill":
    sys.exit(end_those_writing_to(sys.argv[2]))
try:
    first, second = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
except OSError as error:
    sys.exit(f"no: {error}")
if "--near" in sys.argv:
    print("; ".join(f"{name}: here {first[name]:.2f}, there {second[name]:.2f}" for name in ("acc", "maa", "bwt")))
    learned = [[row[-1] for row in run["accuracy_matrix"]] for run in (first, second)]
    print("on the new classes, task by task: here {}; there {}".format(*learned))
    sys.exit(abs(first["acc"] - second["acc"]) > 3)
UNEQUAL = ("seconds", "versions", "janus_ext_sha256")  # the last is of the whole file, its times included
different = [key for key in first | second if key not in UNEQUAL and first.get(key) != second.get(key)]
print("no: " + ", ".join(different) if different else "yes")
sys.exit(bool(different))
