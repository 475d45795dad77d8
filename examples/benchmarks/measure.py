"""Run a command once, measure it, and keep the record."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path


def timed(
    command: list[str],
    record: Path,
    limit_s: float | None = None,
    *,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    may_fail: bool = False,
) -> dict:
    """Wall and CPU seconds and peak memory of a command with its children.

    A record that exists is returned as it is: nothing is run twice. The command's output goes to
    a .log file beside the record. The peak is that of the largest process; it cannot come out
    below the size of this one, so that nothing large may be imported before. At the limit the
    command and its children are told to stop, and ten seconds later killed.
    """
    if record.exists():
        return json.loads(record.read_text())
    record.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(record.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=env, cwd=cwd
        )
        stops = [
            threading.Timer((limit_s or 1e6) + later, _stop, (process.pid, how))
            for later, how in ((0, signal.SIGTERM), (10, signal.SIGKILL))
        ]
        for stop in stops:
            stop.daemon = True
            stop.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for stop in stops:
            stop.cancel()
    wall_s = time.monotonic() - start
    result = {
        "command": " ".join(command),
        "finished": status == 0,
        "stopped": status != 0 and limit_s is not None and wall_s >= limit_s,
        "wall_s": round(wall_s, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }
    if not (result["finished"] or result["stopped"] or may_fail):
        raise SystemExit(f"{result['command']} failed; see {record.with_suffix('.log')}")
    record.write_text(json.dumps(result, indent=2))
    return result


def _stop(group: int, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, how)
