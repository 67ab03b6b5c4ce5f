"""Drills that count what happens many times: 10 to 13."""

import asyncio
import os
import signal
import time

import inject
import procs
from cgroup import BYTES, Group
from client import Load
from measure import Share, Spread, said

CYCLE_SECONDS = 40
# A worker that has served for so long was well: neither subject makes its successor wait for that.
WELL_SECONDS = 0.08
CODES = (1, 2, 3, 4, 77, 255)
SIGNALS = (signal.SIGABRT, signal.SIGKILL, signal.SIGXCPU, signal.SIGSYS)
KILLS = 10
WAVES, WAVE_SECONDS = 8, 4


async def cycles(kind, place):
    """10: kill -9 of a lone worker, again as soon as its successor serves."""
    subject = kind(place, workers=1)
    count, zombies = 0, 0
    try:
        await subject.start()
        master = subject.process.pid
        for _ in range(20):
            await cycle(subject)
        before = weigh(master)
        end = time.monotonic() + CYCLE_SECONDS
        while time.monotonic() < end:
            await cycle(subject)
            count += 1
            zombies += sum(1 for pid in procs.children(master) if procs.start_time(pid) is None)
        after = weigh(master)
    finally:
        subject.close()
    return {
        f"in {CYCLE_SECONDS} s": Spread("cycles", [count]),
        "the master's resident memory, first to last": said(f"{before[0]:,} to {after[0]:,} KiB"),
        "the master's descriptors, first to last": said(f"{before[1]} to {after[1]}"),
        "zombies seen when a successor served": Spread("", [zombies]),
    }


async def cycle(subject):
    """From one worker that serves to the next."""
    [pid] = subject.ready()
    await asyncio.sleep(WELL_SECONDS)
    subject.remember()
    procs.signal_quietly(pid, signal.SIGKILL)
    await procs.wait_until(lambda: pid not in subject.ready() and subject.is_whole(), 10, step=0.005)


def weigh(pid):
    """KiB of its resident memory, and its descriptors."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))
    return resident, len(os.listdir(f"/proc/{pid}/fd"))


async def square_wave(kind, place):
    """11: a load that comes for a second, more than one worker has places for, and goes for three."""
    subject = kind(place, workers=1, workers_max=3)
    if not subject.scales:
        return {"workers more, fewer, in 8 waves of 4 s": said("no scaling by load: a number is fixed")}
    load = Load(subject.port)
    steps = {1: 0, -1: 0}
    try:
        await subject.start()
        last, begin = subject.wanted(), time.monotonic()
        for wave in range(WAVES):
            for _ in range(12):
                load.tasks.append(asyncio.create_task(load.once("delay-1000")))
            while time.monotonic() < begin + WAVE_SECONDS * (wave + 1):
                wanted = subject.wanted()
                if wanted != last:
                    steps[1 if wanted > last else -1] += abs(wanted - last)
                    last = wanted
                await asyncio.sleep(0.1)
        await load.end()
    finally:
        subject.close()
    told = f"{steps[1]} more, {steps[-1]} fewer; {len(load.failed())} of {load.sent()} requests failed"
    return {"workers more, fewer, in 8 waves of 4 s": said(told)}


async def exact_causes(kind, place):
    """12: exit codes and signals, each in a service of its own, since some end it."""
    codes, signals, alive = Share(), Share(), Share()
    for code in CODES:
        try:
            is_told, lives = await end_one(kind, place, lambda pid, code=code: inject.exit_with(pid, code), f"code {code}")
        except OSError as error:
            return {"exit codes recorded exactly": said(f"not measured: {error.strerror}")}
        codes.add(Share(int(is_told), 1))
        alive.add(Share(int(lives), 1))
    for number in SIGNALS:

        def kill(pid, number=number):
            procs.signal_quietly(pid, number)

        is_told, lives = await end_one(kind, place, kill, f"signal {int(number)}")
        signals.add(Share(int(is_told), 1))
        alive.add(Share(int(lives), 1))
    return {
        f"exit codes recorded exactly ({', '.join(map(str, CODES))})": codes,
        f"signals recorded exactly ({', '.join(number.name[3:] for number in SIGNALS)})": signals,
        "services that go on after it": alive,
    }


async def end_one(kind, place, end, wanted):
    """Whether the end of one worker is on record as it was, and whether both workers are there again."""
    subject = kind(place)
    try:
        await subject.start()
        victim = min(subject.ready())
        subject.remember()
        end(victim)
        await procs.wait_until(lambda: procs.start_time(victim) is None, 5)
        await procs.wait_until(lambda: subject.cause(victim) != "nothing", 2, step=0.1)
        lives = await procs.wait_until(lambda: not subject.is_alive() or subject.is_whole(), 5, step=0.05)
        return subject.cause(victim) == wanted, lives and subject.is_alive()
    finally:
        subject.close()


async def out_of_memory(kind, place):
    """13: a worker that the kernel ends for want of memory, and one that somebody kills: are they told apart?"""
    try:
        group = Group()
    except OSError as error:
        return {"told apart": said(f"not measured: {error.strerror}")}
    subject = kind(place, group=group)
    for_memory, by_hand = Share(), Share()
    try:
        await subject.start()
        for turn in range(KILLS):
            await procs.wait_until(subject.is_whole, 20, step=0.05)
            await asyncio.sleep(WELL_SECONDS)
            victim = min(subject.ready())
            subject.remember()
            if turn % 2 == 0:
                inject.eat(victim, 4 * BYTES)
            else:
                procs.signal_quietly(victim, signal.SIGKILL)
            await procs.wait_until(lambda victim=victim: procs.start_time(victim) is None, 5)
            await procs.wait_until(lambda victim=victim: subject.cause(victim) != "nothing", 3, step=0.1)
            (for_memory if turn % 2 == 0 else by_hand).add(
                Share(int(subject.is_for_memory(victim) == (turn % 2 == 0)), 1)
            )
    except OSError as error:
        return {"told apart": said(f"not measured: {error.strerror}")}
    finally:
        subject.close()
        group.close()
    return {
        "ends for want of memory that are called so": for_memory,
        "kill -9 that is not called so": by_hand,
    }


DRILLS = {
    10: ("kill -9 of a lone worker, again and again", cycles, 1),
    11: ("square wave of load", square_wave, 1),
    12: ("exit codes and signals", exact_causes, 1),
    13: ("out of memory", out_of_memory, 1),
}
