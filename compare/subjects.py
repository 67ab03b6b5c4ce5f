"""The two subjects, started, watched, reloaded and ended in the same words."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import procs

HERE = Path(__file__).resolve().parent
KEY = "sk-compare-0123456789abcdef"

# Every model that a drill asks for; the scripted upstream reads what to do from the name.
MODELS = ("ok", "delay-50", "delay-1000", "stream-20-50", "stream-40-50", "stream-1200-50")


class Subject:
    """One server, with a folder of its own and a port that it keeps over restarts."""

    name = ""

    def __init__(self, place, *, workers=2, workers_max=None, drain_seconds=None, group=None):
        """`place` says where things are (see `run`); `drain_seconds` is the subject's default if it is `None`; it runs in
        `group` if there is one."""
        self.place = place
        self.workers_wanted = workers
        self.workers_max = workers_max or workers
        self.group = group
        self.drain_seconds = drain_seconds
        self.port = procs.free_port()
        # A port may have been another subject's before.
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name.split()[0].lower()}-", dir=place.folder))
        self.process = None
        self.seen = {}

    @property
    def log(self):
        return self.folder / "stderr"

    @property
    def key_file(self):
        return self.folder / "key"

    def spawn(self):
        """Starts it and returns at once; also the successor of one that was killed."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.group.within(self.command()) if self.group else self.command(),
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self.process

    async def start(self):
        """Starts it and waits until all workers serve."""
        self.key_file.write_text(KEY + "\n", encoding="ascii")
        self.write_configuration()
        self.spawn()
        if not await procs.wait_until(self.is_whole, 20, step=0.05):
            raise RuntimeError(f"{self.name} does not start; it said:\n{self.said()}")

    def said(self):
        return self.log.read_text(encoding="utf-8", errors="replace")[-4000:]

    def remember(self):
        """Its processes as they are now, so that `close` finds what a dead master left."""
        for pid in [self.process.pid, *procs.children(self.process.pid)]:
            start = procs.start_time(pid)
            if start is not None:
                self.seen[pid] = start

    def is_whole(self):
        """Whether as many workers as wanted are there and serve."""
        return len(self.ready()) == self.workers_wanted

    def is_alive(self):
        return self.process.poll() is None

    def hang_up(self):
        self.process.send_signal(signal.SIGHUP)

    def close(self):
        """Ends whatever is left of it, without asking."""
        if self.process is None:
            return
        self.remember()
        if self.is_alive():
            self.process.kill()
        self.process.wait()
        for pid, start in self.seen.items():
            procs.kill_if_same(pid, start)


class Evergate(Subject):
    """The release binary; all defaults but ports and number of workers."""

    name = "Evergate"
    hang_seconds = 10
    scales = True

    def command(self):
        return [str(self.place.evergate), "serve", "--config", "evergate.toml", "--state-dir", "state"]

    def environment(self):
        return {"PATH": os.environ.get("PATH", ""), "HOME": str(self.folder)}

    @property
    def configuration(self):
        return self.folder / "evergate.toml"

    def write_configuration(self):
        text = (
            f'[server]\nlisten = ["127.0.0.1:{self.port}"]\n[admin]\nlisten = "127.0.0.1:0"\n'
            f"[workers]\nmin = {self.workers_wanted}\nmax = {self.workers_max}\n"
            f'[upstreams.fake]\nbase_url = "http://{self.place.upstream}/v1"\napi_key = {{ file = "key" }}\n'
        )
        if self.workers_max > self.workers_wanted:
            text = text.replace("[workers]\n", '[workers]\nslots = 4\nidle_after = "1s"\n')
        if self.drain_seconds is not None:
            text += f'[shutdown]\ndrain = "{self.drain_seconds}s"\n'
        for model in MODELS:
            text += f'[models."{model}"]\ntargets = [{{ upstream = "fake", model = "{model}" }}]\n'
        self.configuration.write_text(text, encoding="utf-8")

    def ask(self, command):
        run = subprocess.run(
            [str(self.place.evergate), command, "--json", "--state-dir", "state"],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            timeout=10,
            check=False,
        )
        return json.loads(run.stdout) if run.returncode == 0 else None

    def workers(self):
        """Pids of its workers, ready or not."""
        return {pid for pid in procs.children(self.process.pid) if "worker" in procs.arguments(pid)[1:2]}

    def ready(self):
        status = self.ask("status") or {"children": []}
        found = (c for c in status["children"] if c["kind"] == "worker" and c["phase"] == "ready")
        # A dead master's run file may still be there: only children of this one count.
        return {child["pid"] for child in found} & self.workers()

    def wanted(self):
        """How many workers it wants at this moment."""
        return self.ask("status")["master"]["workers_target"]

    def named(self, names):
        """How many of these requests a record names as lost."""
        told = json.dumps(self.ask("exits"))
        return sum(1 for name in names if f'"{name}"' in told)

    def cause(self, pid):
        """What is on record of the end of `pid`."""
        for record in reversed(self.ask("exits") or []):
            if record["pid"] == pid:
                if record.get("signal") is not None:
                    return f"signal {record['signal']}"
                return f"code {record.get('code')}"
        return "nothing"

    def is_for_memory(self, pid):
        """Whether its record says that the kernel ended `pid` for want of memory."""
        return any(r["pid"] == pid and r["initiator"] == "out_of_memory" for r in self.ask("exits") or [])


class Gunicorn(Subject):
    """Gunicorn with uvicorn workers and the application in `gunicorn/`."""

    name = "Gunicorn"
    hang_seconds = 30
    scales = False
    worker_class = "worker.PatientWorker"

    def command(self):
        return [str(self.place.python), "-m", "gunicorn", "-c", "gunicorn.conf.py", "app:app"]

    def environment(self):
        return {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self.folder),
            "COMPARE_BIND": f"127.0.0.1:{self.port}",
            "COMPARE_WORKERS": str(self.workers_wanted),
            "COMPARE_WORKER_CLASS": self.worker_class,
            "COMPARE_GRACEFUL_SECONDS": str(self.drain_seconds or 30),
            "COMPARE_ACCESS_LOG": "access.log",
            "COMPARE_CONTROL_SOCKET": str(self.folder / "ctl"),
            "COMPARE_UPSTREAM": f"http://{self.place.upstream}",
            "COMPARE_KEY_FILE": "key",
        }

    @property
    def configuration(self):
        return self.folder / "gunicorn.conf.py"

    def write_configuration(self):
        for file in ("gunicorn.conf.py", "app.py", "worker.py"):
            shutil.copy(HERE / "gunicorn" / file, self.folder / file)

    def workers(self):
        """Pids of its workers, ready or not."""
        return set(procs.children(self.process.pid))

    def ready(self):
        told = self.log.read_text(encoding="utf-8", errors="replace")
        started = re.findall(r"\[(\d+)\] \[INFO\] Application startup complete", told)
        return {int(pid) for pid in started} & self.workers()

    def named(self, names):
        """How many of these requests a log names as lost: in the error log, or with another status than 200."""
        told = self.log.read_text(encoding="utf-8", errors="replace")
        access = self.folder / "access.log"
        lines = access.read_text(encoding="utf-8", errors="replace").splitlines() if access.exists() else []
        told += "".join(line for line in lines if not re.search(r'HTTP/1.1" 200\b', line))
        words = set(re.findall(r"cmp-\d+-\d+", told))
        return sum(1 for name in names if name in words)

    def cause(self, pid):
        """What is on record of the end of `pid`."""
        told = self.log.read_text(encoding="utf-8", errors="replace")
        found = re.findall(rf"Worker \(pid:{pid}\) (?:exited with (code \d+)|was sent SIG(\w+))", told)
        if not found:
            return "nothing"
        code, word = found[-1]
        return code or f"signal {int(getattr(signal, 'SIG' + word))}"

    def is_for_memory(self, pid):
        """Whether its log says of `pid` that it may have been out of memory."""
        return f"Worker (pid:{pid}) was sent SIGKILL! Perhaps out of memory?" in self.log.read_text(
            encoding="utf-8", errors="replace"
        )


class StockGunicorn(Gunicorn):
    """With uvicorn's own worker class, which waits for streams without a limit of its own."""

    name = "Gunicorn stock"
    worker_class = "uvicorn_worker.UvicornWorker"


if sys.version_info < (3, 11):
    raise SystemExit("compare: Python 3.11 or newer is needed")
