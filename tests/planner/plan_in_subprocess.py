"""Plans a folder in a process of its own, so that it can be killed: URL FOLDER OUTPUT."""

import sys
from pathlib import Path

from tests.planner.scripted_model import plan_all

if __name__ == "__main__":
    url, folder, output = sys.argv[1:]
    plan_all(url, Path(folder), Path(output))
