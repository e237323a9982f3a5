"""Files are whole or absent, and a target has one writer: in threads, in processes, and after one was killed."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from dsv32_jax.common.files import locked, replace_directory, whole_file
from dsv32_jax.errors import UserError

HOLDER = """
import os, sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
open(sys.argv[1], "w").write(str(os.getpid()))
print("held", flush=True)
time.sleep(60)
"""


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    target = tmp_path / "result.json"
    with whole_file(target) as first:
        first.write_text("first")
        with whole_file(target) as second:
            assert second.suffix == ".json"
            second.write_text("second")
        assert target.read_text() == "second" and first.read_text() == "first"
    assert target.read_text() == "first" and os.listdir(tmp_path) == ["result.json"]


def test_a_failed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(target) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]


def test_a_target_is_locked_against_this_thread_and_others(tmp_path):
    target, refusals = tmp_path / "new" / "out", []

    def attempt():
        with pytest.raises(UserError, match=rf"out: process {os.getpid()} is writing it") as caught, locked(target):
            pass
        refusals.append(caught.value)

    with pytest.raises(KeyboardInterrupt), locked(target) as held:
        attempt()
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        with locked(tmp_path / "new" / "another"), locked(held) as same:  # what is handed on may be written
            assert os.fspath(same) == str(target)
        raise KeyboardInterrupt
    assert len(refusals) == 2 and not os.listdir(target.parent)
    with locked(target):
        pass


@pytest.mark.parametrize("content", ["", "no number", "-1", "9" * 9, "9" * 30, "{own}"])
def test_a_lock_file_that_nobody_holds_is_stale(tmp_path, content):
    """After a crash of the machine, the process id in the file may be that of another process."""
    (tmp_path / ".out.lock").write_text(content.replace("{own}", str(os.getpid())))
    with locked(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text() == str(os.getpid())
    assert not os.listdir(tmp_path)


def test_a_killed_holder_holds_no_longer(tmp_path):
    file = tmp_path / ".out.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"{tmp_path / 'out'}: process {holder.pid} is writing"):
            with locked(tmp_path / "out"):
                pass
        holder.send_signal(signal.SIGKILL)
    assert file.exists()
    with locked(tmp_path / "out"):
        pass
    assert not file.exists()


@pytest.mark.parametrize("old", [True, False])
def test_a_directory_takes_the_place_of_another(tmp_path, old):
    for name in ("new", "out", ".out.old")[: 3 if old else 1]:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_directory(tmp_path / "new", tmp_path / "out")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/new"]
