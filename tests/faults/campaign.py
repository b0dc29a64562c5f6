"""The campaigns of this folder in turn: ``make test-faults``, or ``python tests/faults/campaign.py [NAME …]`` for some of them.

Each is a script whose last line sums up what it found, and whose exit code is 0 when all was well, or 77 where what it needs is
not here. The exit code of all is 1 when that of any is neither.
"""

import subprocess
import sys
import time
from pathlib import Path

NOT_HERE = 77
STATES = {0: "ok", NOT_HERE: "not here"}


def main() -> int:
    """Returns the exit code."""
    scripts = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.py")) if path.name != Path(__file__).name}
    names = sys.argv[1:] or list(scripts)
    if unknown := set(names) - scripts.keys():
        print(f"there is no campaign {', '.join(sorted(unknown))}: choose among {', '.join(scripts)}", file=sys.stderr)
        return 2
    found = []
    for name in names:
        print(f"=== {name}", flush=True)
        start, last = time.monotonic(), ""
        with subprocess.Popen([sys.executable, "-u", scripts[name]], stdout=subprocess.PIPE, text=True) as campaign:
            for line in campaign.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
        found.append((name, campaign.returncode, time.monotonic() - start, last))
    print("=== summary")
    for name, code, seconds, last in found:
        print(f"{name:10} {STATES.get(code, 'FAILED'):8} {seconds:6.0f} s  {last}", flush=True)
    return int(any(code not in STATES for _, code, _, _ in found))


if __name__ == "__main__":
    sys.exit(main())
