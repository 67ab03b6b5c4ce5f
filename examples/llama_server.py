#!/usr/bin/env python3
"""llama.cpp's HTTP server, from the wheel `xllamacpp`: llama_server.py MODEL PORT [--embedding]

A managed server for Evergate: process = { mode = "server", argv = ["python3", "llama_server.py", "tiny.gguf", "{port}"] }
"""
import signal
import sys

import xllamacpp


def params(model, port, is_embedding=False):
    wanted = xllamacpp.CommonParams()
    wanted.model.path = model
    wanted.hostnames = ["127.0.0.1"]
    wanted.port = port
    wanted.n_ctx = 1024
    wanted.n_parallel = 2
    wanted.cpuparams.n_threads = 1
    wanted.warmup = False
    wanted.ui = False
    if is_embedding:
        wanted.embedding = True
        wanted.pooling_type = 1  # the mean
    return wanted


if __name__ == "__main__":
    server = xllamacpp.Server(params(sys.argv[1], int(sys.argv[2]), "--embedding" in sys.argv))
    print("listening on", server.listening_address, file=sys.stderr)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
