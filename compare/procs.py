"""Processes by /proc: whose children live, and waiting with a deadline."""

import asyncio
import os
import signal
import socket
import time


def children(pid):
    """The pids of the children of `pid`'s main thread; none if it is gone."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def arguments(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().decode("utf-8", "replace").split("\0")
    except OSError:
        return []


def start_time(pid):
    """In clock ticks, so that a pid used again is another process; `None` for one that is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def signal_quietly(pid, number):
    """To exactly that process; one that is gone is no error."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def kill_if_same(pid, start):
    """KILL to the process that had `pid` at `start`, if it is still that one."""
    if start is not None and start_time(pid) == start:
        signal_quietly(pid, signal.SIGKILL)


async def wait_until(condition, seconds, step=0.01):
    """Whether `condition` came true in that time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(step)
    return True


def free_port():
    """A port that nobody listens on. It stays free for as long as nobody asks for it by its number."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
