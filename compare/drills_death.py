"""Drills in which processes die: 1 to 4, 8 and 9."""

import asyncio
import signal
import time

import inject
import procs
from client import OK, Load
from measure import Failures, Share, Spread, said

KILLS = 5
IDLE_KILLS = 20


async def killed_under_load(kind, place):
    """1: kill -9 of one of two workers, 100 requests a second on connections of their own."""
    subject = kind(place)
    load = Load(subject.port)
    try:
        await subject.start()
        load.arrivals(100, "delay-50")
        for _ in range(KILLS):
            await asyncio.sleep(1)
            subject.remember()
            procs.signal_quietly(sorted(subject.ready())[-1], signal.SIGKILL)
            await procs.wait_until(subject.is_whole, 10, step=0.05)
        await asyncio.sleep(1)
        await load.end()
        lost = [result.name for result in load.failed()]
        measures = {
            f"failed requests, {KILLS} kills a round": Failures.of(load),
            "failed requests that a record or log names as lost": Share(subject.named(lost), len(lost)),
        }
    finally:
        subject.close()
    first, again = Spread("ms"), Spread("ms")
    for _ in range(KILLS):
        first.add(await killed_alone(kind, place, 1))
    again.add(await killed_alone(kind, place, KILLS))
    return measures | {
        "a worker alone: first kill to the next answer": first,
        f"a worker alone: {KILLS} kills, each when it serves again": again,
    }


async def killed_alone(kind, place, kills):
    """How long a client waits that comes at the moment of the kill, when there is no second worker."""
    subject = kind(place, workers=1)
    load = Load(subject.port)
    times = Spread("ms")
    try:
        await subject.start()
        for _ in range(kills):
            [pid] = subject.ready()
            subject.remember()
            # The client comes after the process is gone, or it would be the killed worker's own.
            procs.signal_quietly(pid, signal.SIGKILL)
            begin = time.monotonic()
            await procs.wait_until(lambda pid=pid: procs.start_time(pid) is None, 2, step=0.0005)
            while (result := await load.once("ok", patience=10)).end != OK and time.monotonic() < begin + 10:
                pass
            if result.end == OK:
                times.add(Spread("ms", [1000 * (result.ended - begin)]))
            await procs.wait_until(subject.is_whole, 10, step=0.02)
    finally:
        subject.close()
    return times


async def killed_idle(kind, place):
    """2: kill -9 of a worker without a request, and clients that come in the same instant."""
    subject = kind(place)
    load = Load(subject.port)
    try:
        await subject.start()
        for turn in range(IDLE_KILLS):
            await procs.wait_until(subject.is_whole, 10, step=0.02)
            subject.remember()
            ready = sorted(subject.ready())
            procs.signal_quietly(ready[turn % len(ready)], signal.SIGKILL)
            for _ in range(10):
                await load.once("ok")
    finally:
        subject.close()
    return {f"failed requests, {IDLE_KILLS} kills a round": Failures.of(load)}


async def frozen(kind, place):
    """3: SIGSTOP of one of two workers, 100 requests a second; how long until it is replaced."""
    subject = kind(place)
    load = Load(subject.port)
    try:
        await subject.start()
        load.arrivals(100, "delay-50")
        await asyncio.sleep(6)
        victim = min(subject.ready())
        subject.remember()
        begin = time.monotonic()
        procs.signal_quietly(victim, signal.SIGSTOP)
        limit = subject.hang_seconds + 10
        is_replaced = await procs.wait_until(
            lambda: procs.start_time(victim) is None and subject.is_whole(), limit, step=0.1
        )
        replaced = time.monotonic()
        await load.end()
    finally:
        subject.close()
    answered = [result.ended for result in load.results if result.end == OK]
    before = sum(1 for at in answered if begin - 5 <= at < begin)
    after = sum(1 for at in answered if begin <= at < begin + 5)
    return {
        "throughput in the 5 s after, to the 5 s before": Spread("%", [100 * after / before]),
        "frozen to replaced (its limit: Evergate 10 s, Gunicorn 30 s, both defaults)": Spread(
            "s", [replaced - begin] if is_replaced else []
        ),
        "failed requests until it was replaced": Failures.of(load),
    }


async def crash_loop(kind, place):
    """4: every process in one worker's place ends when it is 300 ms old, for 10 s: by a fault of its own, or by kill -9."""
    measures = {}
    for name, end in LOOPS.items():
        try:
            found = await end_again_and_again(kind, place, end)
        except OSError as error:
            found = {"": said(f"not measured: {error.strerror}")}
        measures |= {f"{name}: {what}": value for what, value in found.items()}
    return measures


LOOPS = {"memory fault": inject.fault, "kill -9": lambda pid: procs.signal_quietly(pid, signal.SIGKILL)}


async def end_again_and_again(kind, place, end):
    """Under 50 requests a second. The other worker is left alone."""
    subject = kind(place)
    load = Load(subject.port)
    try:
        await subject.start()
        load.arrivals(50, "delay-50")
        await asyncio.sleep(1)
        spared = min(subject.ready())
        begin = time.monotonic()
        born = {}
        killed = set()
        while (now := time.monotonic()) < begin + 10:
            for pid in subject.workers() - {spared}:
                if now - born.setdefault(pid, now) >= 0.3 and pid not in killed:
                    subject.remember()
                    killed.add(pid)
                    end(pid)
            await asyncio.sleep(0.02)
        is_healed = await procs.wait_until(subject.is_whole, 20, step=0.05)
        healed = time.monotonic() - begin - 10
        await load.end()
    finally:
        subject.close()
    return {
        "failed requests": Failures.of(load),
        "processes that ended so in the 10 s": Spread("", [len(killed)]),
        "both workers there again after": Spread("s", [healed] if is_healed else []),
    }


async def master_killed(kind, place):
    """8: kill -9 of the master under 100 requests a second, and its successor started at once."""
    subject = kind(place)
    load = Load(subject.port)
    try:
        await subject.start()
        subject.remember()
        orphans = {pid: subject.seen[pid] for pid in procs.children(subject.process.pid) if pid in subject.seen}
        load.arrivals(100, "delay-50")
        await asyncio.sleep(1)
        begin = time.monotonic()
        subject.process.kill()
        subject.process.wait()
        watch = asyncio.create_task(outlive(orphans, begin + 35))
        next_start = await succeed(subject, begin)
        await asyncio.sleep(max(0, begin + 10 - time.monotonic()))
        await load.end()
        orphaned = await watch
    finally:
        subject.close()
    return {
        "the next start, at once, on the same port": said(next_start),
        "failed requests in the 10 s after the kill": Failures.of(load),
        "processes of the dead master still there after 35 s": said(orphaned),
    }


async def outlive(orphans, end):
    """How many of these processes are left at `end`, and when the last one went if none is."""
    begin = time.monotonic()

    def left():
        return [pid for pid, start in orphans.items() if procs.start_time(pid) == start]

    await procs.wait_until(lambda: not left(), end - begin, step=0.05)
    told = f"{len(left())} of {len(orphans)}"
    return told if left() else f"{told}, the last gone after {time.monotonic() - begin:.1f} s"


async def succeed(subject, begin):
    """Starts a successor and says what came of it."""
    process = subject.spawn()
    await procs.wait_until(lambda: process.poll() is not None or subject.is_whole(), 15, step=0.02)
    subject.remember()
    seconds = time.monotonic() - begin
    if process.poll() is not None:
        return f"fails after {seconds:.0f} s, exit code {process.returncode}"
    return f"both workers serve after {1000 * seconds:.0f} ms" if subject.is_whole() else "does not serve within 15 s"


async def causes(kind, place):
    """9: what is on record of a worker that ended with exit code 7, and of one that SEGV ended."""
    subject = kind(place)
    told = {}
    try:
        await subject.start()
        for what, end in ENDS.items():
            await procs.wait_until(subject.is_whole, 10, step=0.05)
            victim = min(subject.ready())
            subject.remember()
            try:
                end(victim)
            except OSError as error:
                told[what] = said(f"not measured: {error.strerror}")
                continue
            await procs.wait_until(lambda victim=victim: procs.start_time(victim) is None, 5)
            await procs.wait_until(lambda victim=victim: subject.cause(victim) != "nothing", 3, step=0.1)
            told[what] = said(subject.cause(victim))
        told["streams that died with both workers, named as lost"] = said(await names_lost(subject))
    finally:
        subject.close()
    return told


ENDS = {
    "on record after exit code 7": lambda pid: inject.exit_with(pid, 7),
    "on record after a memory fault (signal 11)": inject.fault,
    "on record after KILL (signal 9)": lambda pid: procs.signal_quietly(pid, signal.SIGKILL),
}


async def names_lost(subject):
    """Eight streams, and KILL to both workers, wherever the streams are: how many are named as lost?"""
    load = Load(subject.port)
    await procs.wait_until(subject.is_whole, 10, step=0.05)
    load.repeated(8, "stream-40-50", "stream", is_stream=True)
    await asyncio.sleep(1)
    subject.remember()
    load.is_over = True
    for pid in subject.ready():
        procs.signal_quietly(pid, signal.SIGKILL)
    await load.end()
    await asyncio.sleep(0.5)
    lost = [result.name for result in load.failed()]
    return f"{subject.named(lost)} of {len(lost)}"


DRILLS = {
    1: ("kill -9 of a worker under load", killed_under_load, 2),
    2: ("kill -9 of an idle worker", killed_idle, 2),
    3: ("SIGSTOP of a worker under load", frozen, 2),
    4: ("crash loop in one worker's place", crash_loop, 2),
    8: ("kill -9 of the master", master_killed, 1),
    9: ("exit causes", causes, 1),
}
