"""Functions of a test module run in processes that can be killed, without the seconds that importing torch takes each.

One helper process imports the module once and forks for each run; it has no threads, so forking is safe.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_SERVER = """
import importlib, json, os, sys, traceback
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    function, output, arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        code = 0
        try:
            getattr(module, function)(*arguments)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Killable:
    """Context manager. `start` begins one run; `kill` and `wait` end it; `output` is what it has printed so far."""

    def __init__(self, module_file: str, folder: Path) -> None:
        self._output = folder / "output.txt"
        root = Path(module_file).parents[2]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        module = f"tests.{Path(module_file).parent.name}.{Path(module_file).stem}"
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(root), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads},
        )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._ask, self._answer = self._server.stdin, self._server.stdout
        assert self._answer.readline() == "ready\n"

    def __enter__(self) -> Killable:
        return self

    def __exit__(self, *error: object) -> None:
        self._ask.close()
        self._server.kill()
        self._server.wait()
        self._answer.close()

    def start(self, function: str, *arguments: object) -> None:
        self._output.write_text("")
        self._ask.write(json.dumps([function, str(self._output), arguments]) + "\n")
        self._ask.flush()
        self._pid = int(self._answer.readline())

    def output(self) -> str:
        return self._output.read_text()

    def wait_for_line(self, timeout_s: float = 60.0) -> None:
        """Until the run has printed a line."""
        deadline = time.monotonic() + timeout_s
        while "\n" not in self.output():
            assert time.monotonic() < deadline, "the run printed nothing"
            time.sleep(0.001)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        """Exit code; minus the signal's number for a killed run."""
        return int(self._answer.readline())
