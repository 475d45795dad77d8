"""Run a command once, measure it, and keep the record."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path


def timed(command: list[str], record: Path, limit_s: float | None = None) -> dict:
    """Wall and CPU seconds and peak memory of a command with its children.

    A record that exists is returned as it is: nothing is run twice. The command's output goes to
    a .log file beside the record. The peak cannot come out below the size of this process, so that
    nothing large may be imported before.
    """
    if record.exists():
        return json.loads(record.read_text())
    record.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(record.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        stop = threading.Timer(limit_s or 1e9, os.killpg, (process.pid, signal.SIGTERM))
        stop.daemon = True
        stop.start()
        _, status, usage = os.wait4(process.pid, 0)
        stop.cancel()
    result = {
        "command": " ".join(command),
        "finished": status == 0,
        "wall_s": round(time.monotonic() - start, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }
    if status != 0 and limit_s is None:
        raise SystemExit(f"{result['command']} failed; see {record.with_suffix('.log')}")
    record.write_text(json.dumps(result, indent=2))
    return result
