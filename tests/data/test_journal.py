"""A journaled file is in one committed state or the next, wherever it is cut off."""

import errno
import fcntl
import os
import random
import signal
import warnings

import h5py
import numpy as np
import pytest

from attrbox.data.maps import journal as module
from attrbox.data.maps.journal import Journal, Transactions, is_being_written, journal_of, recover
from attrbox.errors import FileError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)  # 2.5 pages
    return path


def change(file, rng):
    """A few writes within and beyond the file, and perhaps a cut; on a file object as on a BytesIO."""
    for _ in range(rng.randrange(1, 6)):
        size = file.seek(0, os.SEEK_END)
        file.seek(rng.randrange(size + 1))
        file.write(rng.randbytes(rng.choice([1, 100, 5000])))
    if rng.random() < 0.3:
        file.truncate(rng.randrange(1000, 20_000))


def whole(file):
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return file.read(size)


@pytest.mark.parametrize("seed", range(12))
def test_it_reads_as_written_and_changes_by_commit_alone(path, tmp_path, seed):
    twin_path = tmp_path / "twin"
    twin_path.write_bytes(path.read_bytes())
    committed = path.read_bytes()
    with Journal(path) as right, Transactions(right) as file, open(twin_path, "r+b") as twin:
        for step in range(6):
            change(file, random.Random(100 * seed + step))
            change(twin, random.Random(100 * seed + step))
            assert whole(file) == whole(twin)
            file.seek(3000)
            twin.seek(3000)
            assert file.read(2500) == twin.read(2500)
            assert path.read_bytes()[: len(committed)] == committed
            file.commit()
            committed = whole(twin)
            assert path.read_bytes() == committed
        change(file, random.Random(seed))
    assert path.read_bytes() == committed  # what was not committed is lost, and takes no space
    assert not journal_of(path).exists()


class Dead(BaseException):
    """The process is no more."""


class Disk:
    """Dies, or is full, at the n-th thing done to it, half way through a write."""

    def __init__(self, monkeypatch, last, error=None):
        self.left, self.error = last, error
        for where, name in ((module, "_write_all"), (os, "ftruncate"), (os, "fsync")):
            monkeypatch.setattr(where, name, self.failing(getattr(where, name), name == "_write_all"))

    def failing(self, function, writes):
        def attempt(file, *rest):
            self.left -= 1
            if self.left < 0 and self.error is None:
                raise Dead
            if self.left == 0:
                if writes:
                    function(file, rest[0][: len(rest[0]) // 2])
                raise self.error or Dead
            return function(file, *rest)

        return attempt


def states(path, tmp_path):
    """What the file holds after each of three commits."""
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    found = [copy.read_bytes()]
    with Journal(copy) as right, Transactions(right) as file:
        for step in range(3):
            change(file, random.Random(step))
            file.commit()
            found.append(copy.read_bytes())
    return found


def test_wherever_it_dies_it_has_the_state_before_or_after(path, tmp_path):
    known = states(path, tmp_path)
    seen = []
    for last in range(1, 200):
        path.write_bytes(known[0])
        done = 0
        with pytest.MonkeyPatch.context() as monkeypatch:
            right = Journal(path)
            file = Transactions(right)
            disk = Disk(monkeypatch, last)
            try:
                for step in range(3):
                    change(file, random.Random(step))
                    file.commit()
                    done = step + 1
            except Dead:
                pass
            file._file.close()  # as the system does for the dead: no more than that
            right._lock.release()
            file._discarding = True
            survived = disk.left > 0
        recover(path)
        content = path.read_bytes()
        state = next((n for n in (done, done + 1) if n < 4 and content[: len(known[n])] == known[n]), None)
        assert state is not None, f"after {last} operations the file is in no known state"
        seen.append(state)
        file.close = lambda: None
        # And it goes on from there.
        with Journal(path) as right, Transactions(right) as file:
            file.truncate(len(known[state]))
            for step in range(state, 3):
                change(file, random.Random(step))
                file.commit()
        assert path.read_bytes() == known[3]
        journal_of(path).unlink(missing_ok=True)
        if survived:
            break
    else:
        pytest.fail("never ran to its end")
    assert set(seen) == {0, 1, 2, 3}
    assert len(seen) > 20


def test_wherever_the_disk_is_full_the_file_keeps_its_state(path, tmp_path):
    known = states(path, tmp_path)
    for last in range(1, 200):
        path.write_bytes(known[0])
        done = 0
        with pytest.MonkeyPatch.context() as monkeypatch, Journal(path) as right:
            file = Transactions(right)
            disk = Disk(monkeypatch, last, OSError(errno.ENOSPC, "No space left on device"))
            try:
                for step in range(3):
                    change(file, random.Random(step))
                    file.commit()
                    done = step + 1
            except OSError:
                pass
            file.close()
            survived = disk.left > 0
        recover(path)
        content = path.read_bytes()
        assert any(content[: len(known[n])] == known[n] for n in (done, done + 1) if n < 4)
        journal_of(path).unlink(missing_ok=True)
        if survived:
            assert done == 3
            break
    else:
        pytest.fail("never ran to its end")
    assert last > 20


def test_hdf5_lives_in_it(path):
    path.unlink()
    with h5py.File(path, "w") as file:
        file.create_dataset("maps", (100, 50), "f4", chunks=(1, 50))
    with Journal(path) as right, Transactions(right) as raw, h5py.File(raw, "r+") as file:
        file["maps"][3] = 7
        file["names"] = ["a", "ü"]
        file.flush()
        raw.commit()
        file["maps"][4] = 8
        file["more"] = 1
        file.flush()
        with h5py.File(path) as seen:  # by any reader of HDF5, between two commits
            assert set(seen) == {"maps", "names"}
            assert seen["maps"][:, 0].tolist() == [0, 0, 0, 7] + [0] * 96
        raw.discard()
    with h5py.File(path) as seen:
        assert set(seen) == {"maps", "names"}
        assert np.all(seen["maps"][3] == 7)


def test_the_second_writer_is_refused(path):
    with Journal(path):
        assert is_being_written(path)
        with pytest.raises(FileError, match="being written by another"):
            Journal(path)
    assert not is_being_written(path)
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("worker", [False, True], ids=["alone", "with a process that reads for it and lives on"])
def test_the_dead_leave_no_lock(path, worker):
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
        child = os.fork()
        if child == 0:
            os.close(writing)
            Journal(path)
            if worker and os.fork() == 0:
                os.read(reading, 1)  # until the test is over
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(reading)
    try:
        os.waitpid(child, 0)
        assert sorted(os.listdir(path.parent)) == ["file", "file.lock"]
        assert not is_being_written(path)
        Journal(path).close()
        assert os.listdir(path.parent) == ["file"]
    finally:
        os.close(writing)


def test_what_cannot_be_written_is_told(path, tmp_path):
    with Journal(tmp_path / "none") as right, pytest.raises(FileError, match="none"):
        Transactions(right)
    with pytest.raises(FileError, match="write beside"):
        Journal(path / "inside")


def test_a_commit_that_is_left_is_done_once(path):
    with Journal(path) as right:
        right.write(5, {0: bytearray(b"abcde")})
    recover(path)
    assert path.read_bytes() == b"abcde"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("text", [b"attrbox journal\n123", b"x" * 100])
def test_a_journal_that_cannot_be_read_is_told(path, text):
    before = path.read_bytes()
    journal_of(path).write_bytes(text)
    for use in (recover, lambda path: Transactions(Journal(path))):
        with pytest.raises(FileError, match=r"file\.journal"):
            use(path)
    assert path.read_bytes() == before


def test_empty_journals_of_an_older_version_mean_nothing(path):
    before = path.read_bytes()
    journal_of(path).write_bytes(b"")
    recover(path)
    assert not is_being_written(path)
    with Journal(path) as right, Transactions(right) as file:
        file.write(b"new")
        file.commit()
    assert path.read_bytes() == b"new" + before[3:]
    assert os.listdir(path.parent) == ["file"]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(FileError, match=r"No locks available.*a file system with locks"), Journal(tmp_path / "maps.h5"):
        pass
