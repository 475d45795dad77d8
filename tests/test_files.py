"""Files that are written: links stay, pipes and devices get what was meant for them."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import MODEL, cryorecon

from cryorecon.errors import CryoreconError
from cryorecon.io.files import refuse_to_replace, replacing, require_folders
from cryorecon.run.checkpoint import _disk_error


def written(path: Path, text: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    target, link = tmp_path / "scratch" / "map.mrc", tmp_path / "map.mrc"
    target.write_text("old")
    link.symlink_to(Path("scratch") / "map.mrc")
    written(link)
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["map.mrc"]


def test_a_pipe_gets_what_is_written(tmp_path: Path) -> None:
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    require_folders([pipe])
    refuse_to_replace([pipe], [], overwrite=False)
    written(pipe)
    reader.join(10)
    assert heard == ["new"]
    assert pipe.is_fifo()


def test_a_device_stays_one() -> None:
    before = os.stat(os.devnull)
    written(Path(os.devnull))
    assert os.stat(os.devnull).st_rdev == before.st_rdev
    with pytest.raises(CryoreconError, match="/dev/full could not be written: No space left"):
        written(Path("/dev/full"))


@pytest.mark.parametrize("kind", ["append", "write", "pipe"])
def test_an_open_stream_gets_what_is_written_where_it_is(tmp_path: Path, kind: str) -> None:
    """The file behind a redirection is not replaced; what is printed goes on behind it."""
    code = (
        "from cryorecon.io.files import *; from pathlib import Path\n"
        "print('before')\n"
        "with replacing(Path('/dev/stdout')) as temporary: temporary.write_text('new\\n')\n"
        "print('after')"
    )
    log = tmp_path / "log.txt"
    log.write_text("old\n")
    if kind == "pipe":
        found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        assert found.stdout == b"before\nnew\nafter\n"
        return
    with log.open("a" if kind == "append" else "w") as stream:
        subprocess.run([sys.executable, "-c", code], stdout=stream, check=True)
    assert log.read_text() == ("old\n" * (kind == "append")) + "before\nnew\nafter\n"


def test_a_full_disk_is_told_where_torch_tells_another_thing() -> None:
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > 1000:
                raise OSError(errno.ENOSPC, "full")
            return super().write(data)

    with pytest.raises(RuntimeError) as told:
        torch.save(torch.zeros(100_000), Full())
    assert _disk_error(told.value).errno == errno.ENOSPC
    assert str(_disk_error(RuntimeError("one\ntwo"))) == "[Errno None] one"


@pytest.mark.parametrize("limit", [300, 30_000])
@pytest.mark.parametrize(
    "write",
    [
        "write_moments('m.h5', MomentsData({}, {'a/b': np.random.rand(9, 999), 'c': np.ones(99)}))",
        "save_figure(fsc_figure({'a': FscCurve(torch.rand(9), 16, 1.0, 'a')}), 'm.pdf')",
    ],
)
def test_a_full_disk_is_told_by_libraries_that_write_themselves(
    tmp_path: Path, write: str, limit: int
) -> None:
    """They broke down, HDF5 once more at exit, by a segmentation fault."""
    code = (
        "import resource, torch, numpy as np\n"
        "from cryorecon.io.moments_file import *\n"
        "from cryorecon.run.plots import *\n"
        "from cryorecon.run.curves import FscCurve\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))\n"
        f"try: {write}\n"
        "except CryoreconError as error: print(error)"
    )
    (tmp_path / f"m.{'pdf' if 'pdf' in write else 'h5'}").write_text("old")
    words = [sys.executable, "-c", code]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    (left,) = tmp_path.iterdir()
    if found.stdout:
        assert "could not be written: File too large" in found.stdout
        assert left.read_text() == "old"
    else:
        assert limit > 20_000
        assert left.stat().st_size <= limit


def test_a_command_that_a_queue_ends_leaves_nothing(tmp_path: Path) -> None:
    words = "-m", "cryorecon", "simulate", MODEL, "-o", "out", "--n", "200000", "--box", "32"
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=tmp_path, text=True)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("out/.simulate-*/*.mrcs")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--padding", "0"),
        ("--wiener", "-1"),
        ("--wiener", "nan"),
        ("--wiener", "inf"),
    ],
)
def test_numbers_that_make_no_map_are_refused(tmp_path: Path, words: tuple[str, str]) -> None:
    done = cryorecon("reconstruct", "p.star", "-o", "m.mrc", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert words[0] in done.stderr
