#!/usr/bin/env python3
"""Embeddings by llama.cpp (the wheel `xllamacpp`) behind Evergate's stdio mode: embed_model.py MODEL

The engine runs in this process; the frames are stdio_model.py's.
process = { mode = "stdio", argv = ["python3", "embed_model.py", "tiny.gguf"] }
"""
import sys

import stdio_model


def load():
    # Loaded here and not above: what a library prints while it loads must not get among the frames.
    import xllamacpp
    from llama_server import params

    return xllamacpp.Server(params(sys.argv[1], 0, is_embedding=True))


def answer(model, request, send, check):
    if request["endpoint"] != "embeddings":
        raise ValueError("this model makes embeddings only")
    answered = model.handle_embeddings({"input": request["body"]["input"]})
    if "error" in answered:
        raise ValueError(answered["error"].get("message", "the engine refused"))
    return {"body": {**answered, "model": request["body"]["model"]}}


if __name__ == "__main__":
    stdio_model.load, stdio_model.answer = load, answer
    stdio_model.main()
