"""The client's verdicts, on which every figure rests, against a server that ends its answers in each way.

    python3 -m unittest discover -s compare
"""

import asyncio
import socket
import struct
import subprocess
import sys
import unittest

import client
import inject
import measure
import procs

STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


def chunk(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


WORD = chunk(b'data: {"choices":[]}\n\n')
DONE = chunk(b"data: [DONE]\n\n")
ERROR = chunk(b'data: {"error":{"message":"over"}}\n\n')
LAST = b"0\r\n\r\n"


async def verdict(answer, *, is_stream=True, then="close", patience=2.0):
    """What the client says of a server that takes a request, says `answer` and then does as told."""
    ended = asyncio.Event()

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if then == "reset":
            option = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        if then == "silence":
            await ended.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connection = client.Connection(port)
    result = await client.ask(connection, "name", "ok", is_stream=is_stream, patience=patience)
    ended.set()
    server.close()
    return result.end


class Verdicts(unittest.TestCase):
    def check(self, expected, answer, **how):
        self.assertEqual(asyncio.run(verdict(answer, **how)), expected)

    def test_whole_answers_are_ok(self):
        self.check(client.OK, WHOLE, is_stream=False)
        self.check(client.OK, STREAM + WORD + DONE + LAST)

    def test_an_error_event_is_told_also_when_the_framing_breaks_after_it(self):
        self.check(client.TOLD, STREAM + WORD + ERROR + LAST)
        self.check(client.TOLD, STREAM + WORD + ERROR)

    def test_a_stream_that_ends_in_order_without_a_word_of_its_end_is_truncated(self):
        self.check(client.TRUNCATED, STREAM + WORD + LAST)

    def test_an_answer_that_breaks_off_is_truncated(self):
        self.check(client.TRUNCATED, STREAM + WORD)
        self.check(client.TRUNCATED, WHOLE[:-1], is_stream=False)

    def test_no_answer_is_closed_reset_or_refused(self):
        self.check(client.EOF, b"")
        self.check(client.EOF, WHOLE[:20])
        self.check(client.RESET, b"", then="reset")
        result = asyncio.run(client.ask(client.Connection(procs.free_port()), "name", "ok"))
        self.assertEqual(result.end, client.REFUSED)

    def test_silence_is_a_timeout(self):
        self.check(client.TIMEOUT, STREAM + WORD, then="silence", patience=0.2)

    def test_an_error_status_is_a_failure(self):
        self.check(client.STATUS, b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", is_stream=False)


class Ends(unittest.TestCase):
    def victim(self):
        return subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(30)"],
                                stdout=subprocess.PIPE)

    def check(self, end, expected):
        with self.victim() as process:
            process.stdout.readline()
            try:
                end(process.pid)
            except OSError as error:
                process.kill()
                self.skipTest(f"no ptrace here: {error.strerror}")
            self.assertEqual(process.wait(timeout=5), expected)

    def test_a_process_ends_by_the_code_or_fault_that_was_put_into_it(self):
        self.check(lambda pid: inject.exit_with(pid, 7), 7)
        self.check(inject.fault, -11)


class Tables(unittest.TestCase):
    def test_rounds_add_up(self):
        table = measure.Table()
        for number in (1, 2, 6):
            measures = {"a": measure.Spread("ms", [number]), "b": measure.Share(1, 2), "c": measure.said(f"{number > 1}")}
            table.add("1. drill", "Evergate", measures)
        lines = table.markdown().splitlines()
        self.assertEqual(lines[2], "| 1. drill | a | 2.0 ms (1.0 to 6.0) | — |")
        self.assertEqual(lines[3], "|  | b | 3 of 6 | — |")
        self.assertEqual(lines[4], "|  | c | 2 x True; 1 x False | — |")


if __name__ == "__main__":
    unittest.main()
