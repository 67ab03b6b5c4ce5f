#!/usr/bin/env python3
"""A model behind Evergate's stdio mode (docs/stdio-protocol.md), with the standard library only.

Copy it and fill in `load` and `answer`. As it stands it answers with the last message, word by word:
process = { mode = "stdio", argv = ["python3", "stdio_model.py"] }
"""
import json
import os
import sys
import threading

IN_FLIGHT = 1  # requests that `answer` is called for at once

frames_in = sys.stdin.buffer
frames_out = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # whoever prints, prints to standard error
writing = threading.Lock()


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


def load():
    """Loads the model; what it returns is the first argument of `answer`."""
    return None


def answer(model, request, send, check):
    """Answers one request: calls `send(text)` for each piece and `check()` now and then, and returns the rest of the
    text, or a dict of `result`'s fields such as {"body": ...}. What it raises becomes the request's error."""
    if request["endpoint"] == "embeddings":
        raise ValueError("this model makes no embeddings")
    messages = request["body"].get("messages") or [{"content": request["body"].get("prompt", "")}]
    for index, word in enumerate(str(messages[-1].get("content", "")).split(" ")):
        check()
        send(" " * (index > 0) + word)
    return {"finish_reason": "stop"}


def write(**frame):
    with writing:
        frames_out.write(json.dumps(frame).encode() + b"\n")
        frames_out.flush()


def serve(model, request, cancelled):
    def check():
        if cancelled.is_set():
            raise Cancelled

    try:
        result = answer(model, request, lambda text: write(type="delta", id=request["id"], text=text), check)
        write(type="result", id=request["id"], **(result if isinstance(result, dict) else {"text": result or ""}))
    except Cancelled:
        write(type="error", id=request["id"], message="cancelled", code="cancelled")
    except (KeyError, TypeError, ValueError) as error:
        write(type="error", id=request["id"], message=f"{error}", status=400)
    except Exception as error:
        sys.excepthook(*sys.exc_info())
        write(type="error", id=request["id"], message=f"{type(error).__name__} in the model")


def main():
    model = load()
    running = {}
    write(type="ready", protocol=1, in_flight=IN_FLIGHT)
    for line in frames_in:
        frame = json.loads(line)
        running = {id: (thread, cancelled) for id, (thread, cancelled) in running.items() if thread.is_alive()}
        if frame["type"] == "request":
            cancelled = threading.Event()
            thread = threading.Thread(target=serve, args=(model, frame, cancelled), daemon=True)
            running[frame["id"]] = (thread, cancelled)
            thread.start()
        elif frame["type"] == "cancel" and frame["id"] in running:
            running[frame["id"]][1].set()
        elif frame["type"] == "drain":
            for thread, _ in running.values():
                thread.join(frame.get("grace_ms", 5000) / 1000)
            del model
            write(type="drained")
            return


if __name__ == "__main__":
    main()
