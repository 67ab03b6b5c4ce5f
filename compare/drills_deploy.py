"""Drills of what an operator does: 5 to 7."""

import asyncio
import signal
import time
from collections import Counter

import procs
from client import OK, TOLD, Load
from measure import Failures, Share, Spread, said
from subjects import Gunicorn, StockGunicorn

RELOADS = 10
DRAIN_SECONDS = 5


async def reloads(kind, place):
    """5: HUP again and again, under every kind of client."""
    subject = kind(place)
    load = Load(subject.port)
    replaced = Share()
    try:
        await subject.start()
        load.kept(6, "ok", is_careful=True)
        load.kept(6, "ok", is_careful=False)
        load.repeated(4, "ok", "one-shot")
        load.repeated(6, "stream-20-50", "stream", is_stream=True)
        await asyncio.sleep(1)
        for _ in range(RELOADS):
            before = subject.workers()
            subject.remember()
            subject.hang_up()
            is_new = await procs.wait_until(lambda old=before: is_replaced(subject, old), 15, step=0.05)
            replaced.add(Share(int(is_new), 1))
            await asyncio.sleep(1)
        await load.end()
    finally:
        subject.close()
    return {
        "reloads that replaced every worker": replaced,
        "failed: one request per connection": Failures.of(load, "one-shot"),
        "failed: kept connections, client looks for their end first": Failures.of(load, "kept, looks first"),
        "failed: kept connections, client does not look": Failures.of(load, "kept, does not look"),
        "failed: streams": Failures.of(load, "stream"),
    }


def is_replaced(subject, old):
    """Whether none of the old workers is left and all new ones serve."""
    return not subject.workers() & old and subject.is_whole()


async def broken(kind, place):
    """6: HUP, or a worker's death, while what it would read is broken."""
    return {
        "HUP, configuration with a syntax error": await survive(kind, place, break_configuration, hang_up),
        "HUP, the file with the key is gone": await survive(kind, place, lose_key, hang_up),
        "no HUP, the file with the key is gone, kill -9 of a worker": await survive(kind, place, lose_key, kill_one),
    }


def break_configuration(subject):
    with open(subject.configuration, "a", encoding="utf-8") as file:
        file.write("\nthis is = = no configuration\n")


def lose_key(subject):
    subject.key_file.unlink()


def hang_up(subject):
    subject.hang_up()


def kill_one(subject):
    procs.signal_quietly(min(subject.ready()), signal.SIGKILL)


async def survive(kind, place, harm, then):
    """Does the service live? Asked for six seconds, twenty times a second."""
    subject = kind(place)
    load = Load(subject.port)
    try:
        await subject.start()
        subject.remember()
        load.arrivals(20, "ok")
        await asyncio.sleep(0.5)
        harm(subject)
        then(subject)
        await asyncio.sleep(6)
        await load.end()
        end = None if subject.is_alive() else subject.process.returncode
    finally:
        subject.close()
    failed = len(load.failed())
    if end is not None:
        return said(f"service down, exit code {end}")
    return said("serves on" + (f", {failed} of {load.sent()} failed" if failed else ""))


async def stopped(kind, place):
    """7: TERM with 20 streams open; ten end within the drain, ten would last a minute."""
    measures = await stop(kind, place)
    if kind is Gunicorn:
        stock = await stop(StockGunicorn, place)
        ways = "how they ended"
        measures[ways + ", uvicorn's own defaults"] = stock[ways]
    return measures


async def stop(kind, place):
    subject = kind(place, drain_seconds=DRAIN_SECONDS)
    load = Load(subject.port)
    begun = []
    try:
        await subject.start()
        subject.remember()
        for model in ["stream-40-50", "stream-1200-50"] * 10:
            how = {"is_stream": True, "patience": 30, "on_head": lambda: begun.append(1)}
            load.tasks.append(asyncio.create_task(load.once(model, **how)))
        await procs.wait_until(lambda: len(begun) == 20, 5)
        begin = time.monotonic()
        subject.process.send_signal(signal.SIGTERM)
        is_ended = await procs.wait_until(lambda: not subject.is_alive(), DRAIN_SECONDS + 20)
        seconds = time.monotonic() - begin
        await load.end()
        code = subject.process.poll()
    finally:
        subject.close()
    ends = Counter(result.end for result in load.results)
    truthful = ends[OK] + ends[TOLD]
    broken_off = len(load.results) - truthful
    return {
        "streams that ended truthfully": Share(truthful, len(load.results)),
        "how they ended": said(f"{ends[OK]} whole, {ends[TOLD]} with an error event, {broken_off} broken off"),
        f"gone after (drain: {DRAIN_SECONDS} s)": Spread("s", [seconds] if is_ended else []),
        "exit code": said(str(code)),
    }


DRILLS = {
    5: ("reload (HUP) under load", reloads, 2),
    6: ("broken deploy", broken, 1),
    7: ("TERM with 20 streams open", stopped, 2),
}
