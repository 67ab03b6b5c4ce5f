"""The worker class, apart from the application: Gunicorn's master imports it, and must not import the application."""

import os

from uvicorn_worker import UvicornWorker


class PatientWorker(UvicornWorker):
    """uvicorn cancels what is left a second before Gunicorn would kill the worker; by default it waits for ever."""

    CONFIG_KWARGS = {
        **UvicornWorker.CONFIG_KWARGS,
        "timeout_graceful_shutdown": int(os.environ["COMPARE_GRACEFUL_SECONDS"]) - 1,
    }
