"""How the two commands about worlds end: in one line, whatever a user gave."""

import sys
from collections.abc import Callable

from g2rpo_ray.launch.command import INTERRUPTED, INVALID
from g2rpo_ray.launch.signals import told_to_end
from g2rpo_ray.words import one_line


def exit_status(work: Callable[[], None]) -> int:
    """Do the work: 0 done, 2 a place that cannot be read or written, 130 interrupted; the last two say so in a line."""
    try:
        with told_to_end():
            work()
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return INVALID
    except KeyboardInterrupt:
        print("stopped: what was under way is not kept", file=sys.stderr)
        return INTERRUPTED
    return 0
