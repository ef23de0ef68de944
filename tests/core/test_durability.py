"""Where the power fails, files hold what was committed, and nothing half done.

A disk keeps of a file what was there at its last fsync, all that was written since, or some of it; of a folder the
names at its last fsync, or those of now.
"""

import itertools
import os
import random

import numpy as np
import pytest
from exports import content, export, net, pictures

import attrbox
from attrbox.core import atomic_files
from attrbox.data.maps import journal, writer
from attrbox.data.maps.journal import Journal, Transactions, journal_of, recover

PAGE = 512
METHODS = ["saliency", "deeplift"]


class Disk:
    """The files of a folder, as a power failure would leave them.

    Attributes:
        kept: inode -> its bytes at the last fsync.
        names: name -> inode at the folder's last fsync.
        steps: what was done, in order.
    """

    def __init__(self, folder, monkeypatch, watch=lambda: None):
        self.folder, self.watch, self.watching = folder, watch, False
        self.kept, self.open, self.steps, self.errors = {}, [], [], []
        self.names = self.listed()
        for name, inode in self.names.items():
            self.keep(name, inode)
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "ftruncate"), (journal, "_write_all")):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name), name))

    def listed(self):
        return {entry.name: entry.inode() for entry in os.scandir(self.folder) if entry.is_file()}

    def keep(self, name, inode):
        if inode not in self.kept:
            self.open.append(open(self.folder / name, "rb"))  # noqa: SIM115 - so that no other file gets this inode
        self.kept[inode] = (self.folder / name).read_bytes()

    def watched(self, function, step):
        def done(*arguments):
            result = function(*arguments)
            if self.watching:
                return result
            if step == "fsync":
                inode = os.fstat(arguments[0]).st_ino
                if inode == self.folder.stat().st_ino:
                    self.names = self.listed()
                else:
                    self.keep(next(name for name, there in self.listed().items() if there == inode), inode)
            self.steps.append(step)
            self.look()
            return result

        return done

    def look(self):
        self.watching = True
        try:
            self.watch()
        except BaseException as error:
            self.errors.append(error)  # HDF5 may be the caller, which tells nobody
            raise
        finally:
            self.watching = False

    def failures(self):
        """What may be there after a failure at this moment: name -> bytes."""
        now = self.listed()
        for names in (self.names, now) if self.names != now else (now,):
            choices = []
            for name, inode in names.items():
                old = self.kept.get(inode, b"")
                new = (self.folder / name).read_bytes() if now.get(name) == inode else old
                choices.append(dict.fromkeys((old, new, _some(old, new, 0), _some(old, new, 1))))
            for contents in itertools.product(*choices):
                yield dict(zip(names, contents, strict=True))


def _some(old, new, which):
    """Every other page as it is in the new one, the others as they were."""
    parts = []
    for number, place in enumerate(range(0, len(new), PAGE)):
        page = new[place : place + PAGE]
        parts.append(page if number % 2 == which else old[place : place + PAGE].ljust(len(page), b"\0"))
    return b"".join(parts)


def put(folder, found):
    for file in folder.iterdir():
        file.unlink()
    for name, text in found.items():
        (folder / name).write_bytes(text)


@pytest.fixture
def places(tmp_path):
    """A folder for the files, and one for what a failure leaves."""
    folders = tmp_path / "disk", tmp_path / "after"
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.fixture
def disk(monkeypatch):
    made = []

    def make(*arguments):
        made.append(Disk(arguments[0], monkeypatch, *arguments[1:]))
        return made[0]

    yield make
    for file in made[0].open:
        file.close()
    for error in made[0].errors:
        raise error


def test_a_journaled_file_has_the_state_before_or_after_wherever_the_power_fails(places, disk):
    folder, after = places
    path = folder / "file"
    path.write_bytes(bytes(range(256)) * 40)
    known, seen = [path.read_bytes()], set()

    def check():
        for found in drive.failures():
            put(after, found)
            recover(after / "file")
            text = (after / "file").read_bytes()
            possible = known[-2:] if committing else known[-1:]
            states = [state for state in possible if text[: len(state)] == state]
            assert states, f"after {drive.steps}"
            seen.add(len(known) if states[-1] is known[-1] else len(known) - 1)

    committing = False
    rng = random.Random(0)
    drive = disk(folder, check)
    with Journal(path) as right, Transactions(right) as file:
        for _ in range(3):
            for _ in range(4):
                size = file.seek(0, os.SEEK_END)
                file.seek(rng.randrange(size + 1))
                file.write(rng.randbytes(rng.choice([1, 100, 5000])))
            file.seek(0)
            known.append(file.read(size := file._size))
            assert len(known[-1]) == size
            committing = True
            file.commit()
            committing = False
            drive.look()  # what commit has promised is there for good
    assert seen == {1, 2, 3, 4}


def test_an_export_has_all_batches_that_it_committed_wherever_the_power_fails(places, disk, monkeypatch):
    folder, after = places
    path = folder / "maps.h5"
    whole = after.parent / "whole.h5"
    export(whole, pictures(6), METHODS, batch_size=2)
    expected, promised, seen = content(whole), 0, set()

    def check():
        for found in drive.failures():
            put(after, found)
            if "maps.h5" not in found:
                assert promised == 0
                seen.add(-1)
                continue
            with attrbox.open_maps(after / "maps.h5") as maps:
                rows = [np.flatnonzero(one.done).tolist() for one in maps.values()]
                assert rows[0] == rows[1] == list(range(len(rows[0])))
                assert len(rows[0]) in (promised, promised + 2), f"after {drive.steps}"
                for label, one in maps.items():
                    np.testing.assert_array_equal(one.numpy(rows[0]), expected[f"maps/{label}"][rows[0]])
            assert attrbox.verify(after / "maps.h5") == []
            seen.add(len(rows[0]))

    write = writer.Output.write

    def writing(output, batch):
        nonlocal promised
        write(output, batch)
        promised += len(batch.rows)
        drive.look()

    monkeypatch.setattr(writer.Output, "write", writing)
    drive = disk(folder, check)
    summary = export(path, pictures(6), METHODS, batch_size=2)
    assert summary.complete
    assert seen == {-1, 0, 2, 4, 6}


@pytest.mark.parametrize("pending", [False, True], ids=["whole", "with a commit in the journal"])
@pytest.mark.parametrize("how", ["export", "to_hdf5", "merge"])
def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(places, disk, monkeypatch, how, pending):
    folder, after = places
    path = folder / "maps.h5"
    new = after.parent / "new.h5"
    export(new, pictures(4), METHODS)
    export(path, pictures(4), ["saliency"])
    if pending:  # its writer died before a commit was done
        with monkeypatch.context() as dying:
            dying.setattr(Journal, "apply", lambda *arguments: None)
            export(path, pictures(4), ["saliency", "random"])
        assert journal_of(path).exists()

    def check():
        for found in drive.failures():
            put(after, found)
            with attrbox.open_maps(after / "maps.h5") as maps:
                seen.add(frozenset(maps))
            assert attrbox.verify(after / "maps.h5") == []

    seen = set()
    drive = disk(folder, check)
    if how == "export":
        export(path, pictures(4), METHODS, overwrite=True)
    elif how == "merge":
        attrbox.merge([new], path, overwrite=True)
    else:
        attrbox.compare(net(), pictures(4), METHODS, progress=False).to_hdf5(path, overwrite=True)
    drive.look()
    old = {"saliency", "random"} if pending else {"saliency"}
    assert seen == {frozenset(METHODS), frozenset(old)}
    assert not journal_of(path).exists()


def test_nothing_is_replaced_while_somebody_writes_it(tmp_path):
    path = tmp_path / "maps.h5"
    export(path, pictures(4), METHODS)
    before = path.read_bytes()
    with Journal(path):
        for write in (
            lambda: attrbox.compare(net(), pictures(4), METHODS, progress=False).to_hdf5(path, overwrite=True),
            lambda: attrbox.merge([path], path, overwrite=True),
        ):
            with pytest.raises(attrbox.errors.BusyError, match="another process"):
                write()
    assert path.read_bytes() == before


def test_bytes_before_names(tmp_path, disk):
    """Any file of attrbox: its bytes are durable before its name is, and its name when the call returns."""
    drive = disk(tmp_path)
    with atomic_files.whole_file(tmp_path / "table.csv") as part:
        part.write_text("1")
    assert drive.steps == ["fsync", "replace", "fsync"]
    assert [drive.kept[inode] for inode in drive.names.values()] == [b"1"]
