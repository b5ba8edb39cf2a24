"""ObjectiveModule that follows the dense model as the same text has made it: a corrected teacher.

    python examples/24_corrected_teacher.py novels-25m healing.jsonl.xz held-out.jsonl.xz out

The dense model is trained on the text first; then each start is distilled from it on that text. So
the student need not choose between its teacher and what the text adds. out/corrected.json.
"""

import json
import sys
from pathlib import Path

from retrofit_healing import Run, heal, judge

DENSE_RATE, RATE = 1e-4, 1e-3
PHASES = ((64, 8, 1.0, 3), (640, 4, 0.5**0.5, 1))  # steps, rows of each, rates x, seeds
STARTS = ("hysparse 1:3", "hysparse 1:3 chosen", "hysparse 1:11", "hybrid-swa 1:3")

if __name__ == "__main__":
    dense, text, held_out, out = *sys.argv[1:4], Path(sys.argv[4])
    runs, rows = [], []
    for steps, batch_rows, factor, seeds in PHASES:
        teachers = [Run("dense", steps, batch_rows, factor * DENSE_RATE, n) for n in range(seeds)]
        for teacher in teachers:
            runs.append(teacher)
            rows.append(heal(teacher, dense, text, out))
        corrected = str(teachers[0].folder(out) / "healed")
        for name in STARTS:
            for seed in range(seeds):
                runs.append(Run(name, steps, batch_rows, factor * RATE, seed))
                rows.append(heal(runs[-1], dense, text, out, corrected))
    found = judge([str(run.folder(out) / "healed") for run in runs], held_out)
    study = [row | measured for row, measured in zip(rows, found, strict=True)]
    (out / "corrected.json").write_text(json.dumps({"runs": study}, indent=1) + "\n")
