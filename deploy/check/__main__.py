"""The command: a line for each check, `ok`, `??` (look at it) or `NO`; exit status 1 if any is `NO`."""

import argparse
import signal
import sys

from deploy.check import __doc__ as about
from deploy.check.cluster import Unreachable, access, definitions, operator, queue, room, versions
from deploy.check.image import image
from deploy.check.overlay import read_overlay
from deploy.check.running import running
from deploy.check.space import namespace, quotas, secrets, storage

BEFORE = (versions, operator, definitions, access, namespace, secrets, storage, queue, room, quotas, image)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.check", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overlay", help="a folder of deploy/overlays")
    parser.add_argument("--running", action="store_true", help="say why what was applied does not run")
    options = parser.parse_args()
    try:
        manifests = read_overlay(options.overlay)
        bad = 0
        for check in (running,) if options.running else BEFORE:
            try:
                for state, text in check(manifests):
                    print(f"{state}  {text}", flush=True)
                    bad += state == "NO"
            except Unreachable:
                raise
            except OSError as error:  # one that this user may not do says nothing of the others
                print(f"??  {check.__name__}: {error}", flush=True)
    except KeyboardInterrupt:
        sys.exit("NO  interrupted")
    except OSError as error:
        sys.exit(f"NO  {error}")
    return int(bad > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the pod that was started is taken away
    sys.exit(main())
