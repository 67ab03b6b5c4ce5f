"""A memory cgroup of our own, with a limit. Needs the right to make one: root, mostly."""

import os
import sys
import time
from pathlib import Path

BYTES = 512 << 20


class Group:
    """Raises `OSError` where none can be made."""

    def __init__(self):
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        is_v1 = (v1 / "memory.limit_in_bytes").exists()
        self.folder = (v1 if is_v1 else v2) / f"compare-{os.getpid()}"
        self.folder.mkdir()
        try:
            limit = self.folder / ("memory.limit_in_bytes" if is_v1 else "memory.max")
            # Not created: what is missing is no controller's.
            with open(limit, "r+", encoding="ascii") as file:
                file.write(str(BYTES))
        except OSError:
            self.close()
            raise

    def within(self, command):
        """The command that runs `command` in it from the first instruction on."""
        script = f'echo $$ > {self.folder}/cgroup.procs && exec "$@"'
        return ["/bin/sh", "-c", script, "sh", *command]

    def close(self):
        """Waits until nobody is in it any more: who was killed has to end first."""
        end = time.monotonic() + 5
        while True:
            try:
                return self.folder.rmdir()
            except OSError as error:
                if time.monotonic() > end:
                    return print(f"compare: {self.folder} is left: {error.strerror}", file=sys.stderr)
            time.sleep(0.05)
