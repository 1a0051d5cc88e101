"""Measures how many processors' work a machine does at once: threads of one core, or busy ones, count less than 1."""

import os
import statistics
import subprocess
import sys
import time

SECONDS, REPEATS = 0.5, 3
START_S = 1.0  # until all processes of a measurement have loaded NumPy
LIMIT_S = 60.0
WORK = """
import sys, time
import numpy as np
a, start, seconds, done = np.ones((64, 64), np.float32), float(sys.argv[1]), float(sys.argv[2]), 0
while time.time() < start:
    time.sleep(0.001)
while time.time() < start + seconds:
    a = np.tanh(a @ a)
    done += 1
print(done)
"""  # small products and Python between them, as evaluations of a small model are


def usable_cores() -> float:
    """The work of as many processes as there are processors, at once, in units of what one does alone; 1 or more."""
    number = len(os.sched_getaffinity(0))
    ratios = [_work(number) / _work(1) for _ in range(REPEATS)]
    return max(1.0, statistics.median(ratios))


def _work(processes: int) -> int:
    """Steps that so many processes do together in a fixed time."""
    given = [sys.executable, "-c", WORK, str(time.time() + START_S), str(SECONDS)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = [subprocess.Popen(given, env=alone, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(int(process.communicate(timeout=LIMIT_S)[0]) for process in started)
