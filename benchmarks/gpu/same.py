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
    names = ("acc", "maa", "bwt")
    print("; ".join(f"{n}: here {first[n]}, there {second[n]}" for n in names if n in first and n in second))
    sys.exit(
        abs(first["acc"][-1] - second["acc"][-1]) > 3
        if isinstance(first["acc"], list)
        else abs(first["acc"] - second["acc"]) > 3
    )
UNEQUAL = ("seconds", "versions", "janus_ext_sha256")  # the last is of the whole file, its times included
different = [key for key in first if key not in UNEQUAL and first[key] != second.get(key)]
print("no: " + ", ".join(different) if different else "yes")
sys.exit(bool(different))
