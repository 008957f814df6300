"""Run the battery's steps as processes, several at once, each with a time limit, and log their output as it comes.

A step whose time is up is interrupted as by Ctrl-C, so that it can report its progress and write its results so far.
Ten seconds later the step is killed with all its children.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Log", "Step", "run_together"]

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 10.0  # between an interrupt and the kill
# {minutes} ends this long before the step's limit, but is at least _LEAST_S
_AHEAD_S = 20.0
_LEAST_S = 15.0
# lines of a step's output that the summary keeps
_TAIL = 40
_TAIL_OF_TESTS = 400


@dataclass(frozen=True)
class Step:
    """A step of the battery, run as one process.

    Attributes:
        name: The step's name in the summary.
        command: Arguments after `python`; "{file}", "{xml}" and "{minutes}" are filled in.
        cap_s: The time limit in seconds.
        fine: Exit statuses that mean success.
    """

    name: str
    command: tuple[str, ...]
    cap_s: float
    fine: tuple[int, ...] = (0,)

    @property
    def file(self) -> str | None:
        """Name of the file that the step writes, or None."""
        words = " ".join(self.command)
        return next((f"{self.name}.{kind}" for word, kind in _FILES.items() if word in words), None)

    @property
    def lines(self) -> int:
        """How many lines of the output the summary keeps."""
        return _TAIL_OF_TESTS if "pytest" in self.command else _TAIL


# Many processes run at once, and each would start as many threads and compilers as there are cores.
_ENVIRONMENT = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
_FILES = {"{file}": "json", "{xml}": "xml"}


class Log:
    """A log of the output of all steps, in order of printing, each line with the name of its step."""

    def __init__(self, path: Path) -> None:
        self._file, self._lock = path.open("w", encoding="utf-8", errors="replace"), threading.Lock()

    def write(self, name: str, line: str) -> None:
        """Add a line."""
        with self._lock:
            self._file.write(f"[{name}] {line}")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Process:
    """A running or ended step."""

    def __init__(self, step: Step, out: Path, limit: float, log: Log) -> None:
        self.step, self.out, self.limit, self.log = step, out, limit, log
        self.file = out / step.file if step.file else None
        if self.file:
            # a file found afterwards is then this run's
            self.file.unlink(missing_ok=True)
        minutes = f"{max(limit - _AHEAD_S, _LEAST_S) / 60:.3f}"
        command = [sys.executable, *(_filled(part, str(self.file), minutes) for part in step.command)]
        paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        environment = _ENVIRONMENT | os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        self.began, self.took, self.interrupted = time.monotonic(), 0.0, 0.0
        self.lines: deque[str] = deque(maxlen=step.lines)
        # a session of its own, so that the step's children (compilers, test workers) can be ended with it
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self.log.write(self.step.name, line)

    def ended(self) -> bool:
        """Check whether the step has ended; interrupt it when its time is up, and kill it later."""
        if self.took:
            return True
        now = time.monotonic()
        if self.process.poll() is not None:
            self.took = now - self.began
            self.signal(signal.SIGKILL)  # for children left behind
            return True
        if self.interrupted and now > self.interrupted + GRACE_S:
            self.signal(signal.SIGKILL)
        elif not self.interrupted and now > self.began + self.limit:
            self.interrupt()
        return False

    def interrupt(self) -> None:
        """Interrupt the step as by Ctrl-C."""
        self.interrupted = time.monotonic()
        self.signal(signal.SIGINT)

    def signal(self, number: int) -> None:
        """Send a signal to the step and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def record(self) -> dict[str, Any]:
        """Return the step's record for the summary."""
        self.reader.join(GRACE_S)
        self.process.stdout.close()
        status = self.process.returncode
        ok = status in self.step.fine
        return {
            "name": self.step.name, "state": "out of time" if self.interrupted else "ok" if ok else "failed",
            "exit_status": status, "seconds": round(self.took, 1),
            "file": self.step.file if self.file and self.file.exists() else None,
            "command": " ".join(("python", *self.step.command)), "output": list(self.lines),
        }  # fmt: skip


def _filled(part: str, file: str, minutes: str) -> str:
    return part.replace("{file}", file).replace("{xml}", file).replace("{minutes}", minutes)


def run_together(steps: Sequence[Step], out: Path, left: float, log: Log) -> list[dict[str, Any]]:
    """Run steps at once, wait for all of them, and return a record of each.

    Args:
        steps: The steps.
        out: Folder of their files.
        left: Seconds left; no step gets more.
        log: Log of their output.
    """
    running: list[_Process] = []
    try:
        for step in steps:
            running.append(_Process(step, out, min(step.cap_s, left), log))
        while not all([one.ended() for one in running]):
            time.sleep(0.05)
    # an interrupted battery must leave no step running
    except BaseException:
        _end_all(running)
        raise
    return [one.record() for one in running]


def _end_all(running: Sequence[_Process]) -> None:
    for one in running:
        one.interrupt()
    until = time.monotonic() + GRACE_S
    while time.monotonic() < until and any(one.process.poll() is None for one in running):
        time.sleep(0.05)
    for one in running:
        one.signal(signal.SIGKILL)
        one.process.wait()
        one.reader.join(GRACE_S)
        one.process.stdout.close()
