#!/usr/bin/env python3
"""A small Python chat gateway of the usual kind, with its ways to die: chat_gateway.py PORT

It answers with the last message. A message that begins with one of these words ends it, as such gateways end in real life:

    exit        sys.exit in a handler (which only ends the handler's thread: the client gets nothing)
    thread      an unhandled exception in the only thread that does the work
    os-exit     os._exit(3)
    segfault    a write to address 0
    memory      more memory than it may have, which it meets as a native library does: abort
    hang        a lock that is never given back

Behind Evergate: process = { mode = "server", argv = ["python3", "chat_gateway.py", "{port}"], limits = { memory = "1GiB" } }
"""
import ctypes
import json
import os
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

lock = threading.Lock()


def backend(jobs):
    """Does the work for everybody, one at a time, until it meets something it did not think of."""
    while True:
        text, done = jobs.pop()
        if text.startswith("thread"):
            raise RuntimeError("the only thread that does the work is gone")
        done(text)


class Jobs(list):
    def __init__(self):
        super().__init__()
        self.there = threading.Semaphore(0)

    def append(self, job):
        super().append(job)
        self.there.release()

    def pop(self):
        self.there.acquire()
        return super().pop(0)


jobs = Jobs()


def die(text):
    if text.startswith("exit"):
        sys.exit(1)
    if text.startswith("os-exit"):
        os._exit(3)
    if text.startswith("segfault"):
        ctypes.memset(0, 1, 1)
    if text.startswith("memory"):
        hoard = []
        try:
            while True:
                hoard.append(bytearray(64 << 20))
        except MemoryError:
            hoard.clear()
            traceback.print_exc()
            os.abort()
    if text.startswith("hang"):
        lock.acquire()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with lock:
            if worker.is_alive():
                self.reply({"status": "ok"})
            else:
                self.send_error(503)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = str(request["messages"][-1]["content"])
        die(text)
        answered = threading.Event()
        jobs.append((text, lambda _: answered.set()))
        answered.wait()
        with lock:
            self.answer(request, text)

    def answer(self, request, text):
        base = {"id": "chatcmpl-example", "created": int(time.time()), "model": request["model"]}
        if not request.get("stream"):
            message = {"role": "assistant", "content": text, "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
            return self.reply({**base, "object": "chat.completion", "choices": [choice]})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for delta, finish in [({"role": "assistant", "content": text}, None), ({}, "stop")]:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            event = {**base, "object": "chat.completion.chunk", "choices": [choice]}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    worker = threading.Thread(target=backend, args=(jobs,), daemon=True)
    worker.start()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
