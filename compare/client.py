"""An HTTP/1.1 client that says exactly how a request ended, and the loads that are made of it."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from random import Random

# Longer than any answer asked for here takes; what is not answered by then counts as lost.
PATIENCE = 5.0

OK = "ok"
TOLD = "told"  # a stream that ended with an error event and no [DONE]
REFUSED = "refused"
RESET = "reset"
EOF = "closed"  # before a whole head
TRUNCATED = "truncated"  # in the middle of an answer, or a stream that ended with neither [DONE] nor an error
TIMEOUT = "timeout"
STATUS = "error status"


@dataclass
class Result:
    """How one request ended. `ended` is on the monotonic clock."""

    name: str
    end: str
    ended: float
    kind: str = ""
    status: int = 0


class Connection:
    """One connection to a subject, kept as long as it lasts."""

    def __init__(self, port):
        self.port = port
        self.reader = self.writer = None

    async def open(self):
        """Raises `OSError` when it is refused."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    def is_open(self):
        """Whether a request can be sent on it, as far as is known without looking at the socket."""
        return self.writer is not None

    def is_ended(self):
        """Whether the other side has ended it: what a careful client looks at before it sends another request."""
        return self.reader is not None and (self.reader.at_eof() or self.reader.exception() is not None)

    def close(self):
        if self.writer is not None:
            self.writer.transport.abort()
        self.reader = self.writer = None


def request_bytes(name, model, is_stream, is_kept):
    """A chat completion. Its name is in a header and in the path, so that any log may say it."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    if is_stream:
        body["stream"] = True
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions?id={name} HTTP/1.1\r\nhost: 127.0.0.1\r\nx-request-id: {name}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n"
    )
    if not is_kept:
        head += "connection: close\r\n"
    return head.encode() + b"\r\n" + data


async def ask(connection, name, model, *, is_stream=False, is_kept=False, patience=PATIENCE, on_head=None):
    """One request on `connection`, which is opened if it is not. Never raises for what a server can do."""
    status = 0
    stage = REFUSED
    seen = bytearray()
    try:
        async with asyncio.timeout(patience):
            if not connection.is_open():
                await connection.open()
            stage = EOF
            connection.writer.write(request_bytes(name, model, is_stream, is_kept))
            head = await connection.reader.readuntil(b"\r\n\r\n")
            status, fields = parse_head(head)
            stage = TRUNCATED
            if on_head is not None:
                on_head()
            await read_body(connection.reader, fields, seen)
        end = judge(status, is_stream, seen)
        if not is_kept or fields.get("connection") == "close":
            connection.close()
    except TimeoutError:
        end = TIMEOUT
        connection.close()
    except ConnectionRefusedError:
        end = REFUSED
        connection.close()
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        end = judge_broken(stage, error, is_stream, seen)
        connection.close()
    return Result(name, end, time.monotonic(), status=status)


def parse_head(head):
    """Status and fields, names in lower case. Raises `ValueError` for what is no head."""
    lines = head.decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ")[1])
    pairs = (line.partition(":") for line in lines[1:] if line)
    return status, {name.strip().lower(): value.strip().lower() for name, _, value in pairs}


async def read_body(reader, fields, seen):
    """Adds the body to `seen`. Raises `IncompleteReadError` when it ends before its framing says so."""
    if fields.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            seen += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
    elif "content-length" in fields:
        seen += await reader.readexactly(int(fields["content-length"]))
    else:
        while piece := await reader.read(65536):
            seen += piece


def judge(status, is_stream, seen):
    """What a whole answer, as its framing says, was."""
    if status >= 400:
        return STATUS
    if not is_stream or b"data: [DONE]" in seen:
        return OK
    return TOLD if b'"error"' in seen else TRUNCATED


def judge_broken(stage, error, is_stream, seen):
    """What an answer was that broke at `stage`."""
    if stage == TRUNCATED:
        return TOLD if is_stream and b'"error"' in seen else TRUNCATED
    return RESET if isinstance(error, ConnectionError) else EOF


@dataclass
class Load:
    """Clients of one subject, and what became of their requests."""

    port: int
    results: list = field(default_factory=list)
    in_flight: set = field(default_factory=set)
    tasks: list = field(default_factory=list)
    is_over: bool = False
    stale: int = 0
    random: Random = field(default_factory=lambda: Random(7))
    count: int = 0

    def next_name(self):
        self.count += 1
        return f"cmp-{self.port}-{self.count}"

    async def one(self, connection, model, kind, **how):
        name = self.next_name()
        self.in_flight.add(name)
        result = await ask(connection, name, model, **how)
        self.in_flight.discard(name)
        result.kind = kind
        self.results.append(result)
        return result

    async def once(self, model, kind="one-shot", **how):
        """One request on a connection of its own."""
        return await self.one(Connection(self.port), model, kind, **how)

    def arrivals(self, rate, model):
        """`rate` requests a second, each on a connection of its own, whatever became of those before."""
        self.tasks.append(asyncio.create_task(self._arrive(rate, model)))

    async def _arrive(self, rate, model):
        begin, sent = time.monotonic(), 0
        while not self.is_over:
            while sent < (time.monotonic() - begin) * rate:
                self.tasks.append(asyncio.create_task(self.once(model)))
                sent += 1
            await asyncio.sleep(1 / rate)

    def kept(self, clients, model, *, is_careful):
        """Clients that keep a connection and think for 20 to 80 ms between two requests."""
        for _ in range(clients):
            self.tasks.append(asyncio.create_task(self._keep(model, is_careful)))

    async def _keep(self, model, is_careful):
        kind = "kept, looks first" if is_careful else "kept, does not look"
        connection = Connection(self.port)
        while not self.is_over:
            if is_careful and connection.is_ended():
                self.stale += 1
                connection.close()
            await self.one(connection, model, kind, is_kept=True)
            await asyncio.sleep(self.random.uniform(0.02, 0.08))
        connection.close()

    def repeated(self, clients, model, kind, **how):
        """Clients that ask again as soon as they are answered, each time on a new connection."""
        for _ in range(clients):
            self.tasks.append(asyncio.create_task(self._repeat(model, kind, how)))

    async def _repeat(self, model, kind, how):
        while not self.is_over:
            await self.once(model, kind, **how)
            await asyncio.sleep(self.random.uniform(0.005, 0.02))

    async def end(self):
        """Sends nothing more and waits for what is under way; each request is bounded by its patience."""
        self.is_over = True
        # The list may grow by what an arrival starts last.
        while self.tasks:
            tasks, self.tasks = self.tasks, []
            await asyncio.gather(*tasks)

    def failed(self, kind=None):
        return [r for r in self.results if r.end != OK and (kind is None or r.kind == kind)]

    def sent(self, kind=None):
        return sum(1 for r in self.results if kind is None or r.kind == kind)
