"""A file that changes from one committed state to the next, whatever happens in between.

`Transactions` is a file object, for instance for `h5py.File(Transactions(journal), "r+")`. What is written beyond the
end of the committed state goes to the file at once, since nothing committed refers to it. What would change committed
bytes waits in memory until `commit`, which

    1. makes the new bytes at the end durable,
    2. writes the changed ones into a journal beside the file, `NAME.journal`, which appears whole and durably,
    3. applies them, makes that durable, and removes the journal.

So after a crash (of the process, of the machine, of a full disk) the file holds the state before, or the journal all
that is missing to the one after, which the next to open it applies. As long as somebody writes, `NAME.lock` is locked:
a second writer is refused, and a dead one leaves no lock behind.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout

from attrbox.core.atomic_files import as_path, settle, whole_file
from attrbox.core.tensor_files import read_tensors, write_tensors
from attrbox.errors import BusyError, FileError

_PAGE = 4096
_KIND = "commits"


class Journal(AbstractContextManager["Journal"]):
    """The right to write a file, which need not exist yet: `with Journal(path) as journal: ...`.

    Raises:
        BusyError: another process or object has it.
        FileError: the folder cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = as_path(path)
        self._lock = _locked(self.path)

    def write(self, size: int, pages: Mapping[int, bytearray]) -> None:
        """Make durable that the file shall have this size and, at these offsets, these bytes."""
        held = {str(offset): torch.frombuffer(page, dtype=torch.uint8) for offset, page in pages.items()}
        write_tensors(journal_of(self.path), held, {"size": size}, _KIND, locked=True)

    def apply(self, file: IO[bytes]) -> None:
        """Do to the file what is written here, if anything is.

        Raises:
            FileError: it cannot be read, as that of another version of attrbox.
        """
        if _is_pending(self.path):
            pages, settings = read_tensors(journal_of(self.path), _KIND)
            for offset, page in pages.items():
                file.seek(int(offset))
                _write_all(file, page.numpy().data)
            os.ftruncate(file.fileno(), settings["size"])
            os.fsync(file.fileno())
            journal_of(self.path).unlink()

    def forget(self) -> None:
        """Do to the file what is written here, and forget it durably: it must never be done to another in its place."""
        if self.path.exists():
            with open(self.path, "r+b", buffering=0) as file, suppress(FileError):
                self.apply(file)
        journal_of(self.path).unlink(missing_ok=True)
        settle(self.path.parent)

    def close(self) -> None:
        """Give the right back."""
        if self._lock.is_locked:
            with suppress(OSError):
                os.unlink(self._lock.lock_file)  # while it is locked: it is nobody else's
            self._lock.release()
            settle(self.path.parent)

    def __exit__(self, *exception: object) -> None:
        self.close()


class Transactions(io.RawIOBase):
    """The journal's file, which exists, open for reading and writing; it changes by `commit` alone.

    A write that fails is told by `commit`. Libraries write also while they put objects away, where nobody hears of an
    exception.

    Raises:
        FileError: the file cannot be opened for writing.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal
        self._pages: dict[int, bytearray] = {}  # changed ones of the committed state, by number
        self._place = self._committed = self._size = 0
        self._discarding = False
        self._error: OSError | None = None
        self._file: IO[bytes] = io.BytesIO()
        try:
            self._file = open(journal.path, "r+b", buffering=0)  # noqa: SIM115 - as long as this object
            journal.apply(self._file)
            self._committed = self._size = os.fstat(self._file.fileno()).st_size
        except BaseException as error:
            self._file.close()
            super().close()
            if isinstance(error, OSError):
                raise FileError(
                    f"Cannot write {str(journal.path)!r} ({error}). Check its folder, permissions and free space."
                ) from error
            raise

    def commit(self) -> None:
        """Make all that was written the state of the file.

        Raises:
            OSError, FileError: it cannot be done, as of a full disk; the file keeps the state of the last commit.
        """
        if self._error:
            raise self._error
        os.fsync(self._file.fileno())
        changed = bool(self._pages) or self._size < self._committed
        if changed:
            self._journal.write(self._size, {number * _PAGE: page for number, page in self._pages.items()})
        self._committed = self._size  # from here on, even if the rest is left to whoever opens the file next
        self._pages.clear()
        if changed:
            self._journal.apply(self._file)

    def discard(self) -> None:
        """Ignore what is still to be written, and never commit what was written since the last time."""
        self._discarding = True

    def close(self) -> None:
        """Close the file; what was not committed is lost."""
        if not self.closed:
            self.discard()
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._committed)
            self._file.close()
            super().close()

    # ----------------------------------------------------------------------------------------------- a raw file object

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start, stop = self._place, max(self._place, min(self._place + len(view), self._size))
        self._file.seek(start)
        view[: stop - start] = _read_all(self._file, stop - start)
        for number in range(start // _PAGE, -(-stop // _PAGE)):
            if page := self._pages.get(number):
                origin = number * _PAGE
                first, last = max(start, origin), max(start, min(stop, origin + len(page)))
                view[first - start : last - start] = page[first - origin : last - origin]
        self._place = stop
        return stop - start

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        held = max(0, min(len(view), self._committed - self._place))
        with self._attempt() as able:
            if able and held:
                self._hold(self._place, view[:held])
            if able and held < len(view):
                self._file.seek(self._place + held)
                _write_all(self._file, view[held:])
        self._size = max(self._size, self._place + len(view))
        self._place += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self._place if size is None else size
        with self._attempt() as able:
            if able:
                os.ftruncate(self._file.fileno(), max(size, self._committed))
        self._size = size
        return size

    @contextmanager
    def _attempt(self) -> Iterator[bool]:
        """Whether to write at all; an error is kept for the next commit, before which nothing more is written."""
        try:
            yield not self._discarding
        except OSError as error:
            self._error, self._discarding = error, True

    def _hold(self, start: int, view: memoryview) -> None:
        """Keep changes of committed bytes for the next commit."""
        stop = start + len(view)
        for number in range(start // _PAGE, -(-stop // _PAGE)):
            origin = number * _PAGE
            if number not in self._pages:
                self._file.seek(origin)
                self._pages[number] = bytearray(_read_all(self._file, min(_PAGE, self._committed - origin)))
            first, last = max(start, origin), min(stop, origin + _PAGE)
            self._pages[number][first - origin : last - origin] = view[first - start : last - start]


@contextmanager
def replacing(path: str | Path, overwrite: bool) -> Iterator[Path]:
    """A new file in the place of `path`, as `attrbox.core.atomic_files.whole_file`, unless somebody is writing the
    one there.

    Raises:
        BusyError: another process or object is writing it.
        FileError: as for `whole_file`.
    """
    with Journal(path) as journal, whole_file(path, overwrite, locked=True) as part:
        yield part
        journal.forget()


def recover(path: str | Path) -> None:
    """Finish a commit that was interrupted; does nothing if there is none, or while a living process is writing.

    Raises:
        FileError: there is one, and the file cannot be written.
    """
    if _is_pending(as_path(path)):
        with suppress(BusyError), Journal(path) as right:
            Transactions(right).close()


def is_being_written(path: str | Path) -> bool:
    """Whether some process has the right to write the file."""
    try:
        if lock_of(path).exists():
            Journal(path).close()
    except BusyError:
        return True
    except FileError:  # nobody can write there
        pass
    return False


def journal_of(path: str | Path) -> Path:
    """Where the journal of a file is."""
    path = as_path(path)
    return path.with_name(path.name + ".journal")


def lock_of(path: str | Path) -> Path:
    """Where the lock of a file is."""
    path = as_path(path)
    return path.with_name(path.name + ".lock")


def _is_pending(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return journal_of(path).stat().st_size > 0  # an older attrbox left empty ones
    return False


def _locked(path: Path) -> FileLock:
    """The lock of a file, taken."""
    lock = FileLock(lock_of(path), timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(lock.lock_file, "ab").close()  # tells why, where no file can be made: to the lock it may seem taken
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"{str(path)!r} is being written by another process. Wait for it, stop it, or choose another path."
        ) from None
    except OSError as error:
        raise FileError(
            f"Cannot write beside {str(path)!r}, or lock it ({error}). Check its folder, permissions and free space, "
            "or choose a path on a file system with locks."
        ) from error
    return lock


def _write_all(file: IO[bytes], view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]


def _read_all(file: IO[bytes], size: int) -> bytes:
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
