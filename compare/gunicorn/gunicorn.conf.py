"""Gunicorn as its own documentation advises for an ASGI application that clients reach directly.

`run` copies this file, so that a drill may break the copy. What differs between drills comes from the environment.
"""

import os

bind = os.environ["COMPARE_BIND"]
workers = int(os.environ["COMPARE_WORKERS"])

# The package that uvicorn names for Gunicorn, with uvloop and httptools installed (its "standard" extra). The
# subclass, in worker.py, sets the one thing that the worker cannot take from here: how long uvicorn waits for streams.
worker_class = os.environ["COMPARE_WORKER_CLASS"]

# "Generally, the default of thirty seconds should suffice" stands beside `timeout`: a worker that is silent that long.
timeout = 30
graceful_timeout = int(os.environ["COMPARE_GRACEFUL_SECONDS"])

# "Generally set in the 1-5 seconds range for servers with direct connection to the client".
keepalive = 5

# The FAQ's cure for heartbeats that block on a disk.
worker_tmp_dir = "/dev/shm"

# Both sides keep an access log, since both are asked afterwards which requests were lost.
accesslog = os.environ["COMPARE_ACCESS_LOG"]
errorlog = "-"

# Its default place is the user's, where another Gunicorn may have its own.
control_socket = os.environ["COMPARE_CONTROL_SOCKET"]
