"""Folders and files are replaced as a whole despite kills at every change of the disk, errors and odd places."""

import errno
import json
import os
import resource
import shutil
import stat
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import lora_one
from lora_one.checkpoint.adapter import Adapter, LoraLayer
from lora_one.checkpoint.folder import replacing_adapter
from lora_one.checkpoint.peft import check_folder, read_adapter, read_folder, write_peft
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError
from lora_one.files import atomic, staging
from lora_one.files.atomic import replacing, replacing_file, write_whole
from lora_one.files.exchange import exchange
from tests.files.kills import killed_before_each_change

OUT, IN = 5, 3
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signals")


def adapter(rank: int) -> Adapter:
    """Return an adapter whose entries and alpha all equal the rank, so that a mixture of two would show."""
    pair = Factors(np.full((rank, IN), float(rank)), np.full((OUT, rank), float(rank)))
    return Adapter({"layer": LoraLayer([pair], float(rank), "F32")})


def save(path: Path, rank: int) -> None:
    with replacing_adapter(path) as folder:
        write_peft(folder, adapter(rank))
        (folder / "lora_one.json").write_text(json.dumps({"rank": rank}))


def rank_in(path: Path) -> int:
    """Return the rank of the adapter in a folder, all of whose files must be from the same save."""
    folder = read_folder(path)
    assert check_folder(folder, {"layer": (OUT, IN)}) == []
    rank = folder.config["r"]
    layer = read_adapter(folder).layers["layer"]
    assert layer.scaling == rank and all((factor == rank).all() for factor in layer.pairs[0])
    assert json.loads((path / "lora_one.json").read_text()) == {"rank": rank}
    return rank


def path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else ""


@pytest.fixture(autouse=True)
def flushed(monkeypatch) -> list[str]:
    """Log flushes and exchanges in order. Nothing waits for the disk, since a kill loses nothing that was written."""
    log: list[str] = []
    swap = atomic.exchange
    monkeypatch.setattr(os, "fsync", lambda descriptor: log.append(path_of(descriptor)))
    monkeypatch.setattr(atomic, "exchange", lambda *names: log.append("exchange") or swap(*names))
    return log


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter of rank 2 among the user's own files."""
    path = tmp_path / "runs" / "adapter"
    save(path, 2)
    (path / "README.md").write_text("mine")
    save(path / "checkpoint-5", 7)
    (path / "latest").symlink_to("checkpoint-5")
    return path


def assert_users_things_are_there(path: Path) -> None:
    assert (path / "README.md").read_text() == "mine"
    assert rank_in(path / "checkpoint-5") == 7 and os.readlink(path / "latest") == "checkpoint-5"


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


ALL = {"adapter_config.json", "adapter_model.safetensors", "lora_one.json", "README.md", "checkpoint-5", "latest"}


@pytest.fixture
def no_exchange(monkeypatch):
    def refuse(first, second):
        raise OSError(errno.EINVAL, "not on this file system")

    monkeypatch.setattr(atomic, "exchange", refuse)


def test_killed_at_any_moment_a_folder_holds_the_old_adapter_or_the_new_one(folder):
    seen = []
    for moment in killed_before_each_change(lambda: save(folder, 3)):
        seen.append(rank_in(folder))
        assert_users_things_are_there(folder)
        save(folder, 2)
        assert names(folder) == ALL and names(folder.parent) == {"adapter"}, moment
    assert seen[0] == 2 and seen[-1] == 3 and seen == sorted(seen) and len(seen) > 20


def test_killed_at_any_moment_a_first_save_leaves_nothing_or_all(tmp_path):
    path = tmp_path / "new" / "adapter"
    for moment in killed_before_each_change(lambda: save(path, 3)):
        assert not path.exists() or rank_in(path) == 3
        assert moment or path.exists()
        # What is left over does not look like an adapter folder, neither by its name nor by its files.
        assert not [f for f in tmp_path.rglob("*/adapter_config.json") if f.parent.name.startswith(".lora")]


def test_without_an_exchange_a_kill_never_leaves_a_mixture(folder, no_exchange):
    opened = []
    for moment in killed_before_each_change(lambda: save(folder, 3)):
        if (folder / "adapter_config.json").exists():
            opened.append(rank_in(folder))
        else:  # no program opens it
            opened.append(0)
        assert_users_things_are_there(folder)
        save(folder, 2)
        assert names(folder) == ALL and names(folder.parent) == {"adapter"}, moment
    assert opened[0] == 2 and opened[-1] == 3 and opened.count(0) <= 6


def test_killed_at_any_moment_convert_leaves_nothing_or_all(folder, tmp_path):
    for to, file in (("peft", "adapter_model.safetensors"), ("mlx", "adapters.safetensors")):
        for moment in killed_before_each_change(lambda to=to: lora_one.convert(folder, tmp_path / to, to)):
            if (tmp_path / to).exists():
                assert rank_in(tmp_path / to) == 2 and (tmp_path / to / file).is_file()
                shutil.rmtree(tmp_path / to)
            else:
                assert moment
            lora_one.convert(folder, tmp_path / to, to)
            assert rank_in(tmp_path / to) == 2 and names(tmp_path) == {"runs", to}
            shutil.rmtree(tmp_path / to)


def test_killed_at_any_moment_a_file_is_the_old_one_or_the_new_one(tmp_path):
    file = tmp_path / "evaluation.json"
    write_whole(file, "old")
    seen = []
    for _ in killed_before_each_change(lambda: write_whole(file, "new" * 1000)):
        seen.append(file.read_text())
        write_whole(file, "old")
        assert names(tmp_path) == {file.name}
    assert set(seen) == {"old", "new" * 1000} and seen[0] == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file was flushed")
def test_all_is_on_the_disk_before_it_is_in_place(folder, flushed):
    flushed.clear()
    save(folder, 3)
    before = flushed[: flushed.index("exchange")]
    assert {Path(file).name for file in before} >= {"adapter_config.json", "adapter_model.safetensors", "lora_one.json"}
    assert {Path(file).name for file in before} >= {"new", "stand-in"} and flushed[-1] == str(folder.parent)


def test_it_stays_the_same_folder(folder, monkeypatch):
    """A terminal stays in it; its permissions and the user's own files are unchanged."""
    folder.chmod(0o750)
    before = [os.stat(path).st_ino for path in (folder, folder / "README.md", folder / "checkpoint-5")]
    monkeypatch.chdir(folder)
    save(Path(), 3)
    assert rank_in(Path()) == 3 and [os.stat(path).st_ino for path in (".", "README.md", "checkpoint-5")] == before
    assert stat.S_IMODE(os.stat(".").st_mode) == 0o750


def test_a_new_folder_and_a_new_file_have_the_usual_rights(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    save(tmp_path / "adapter", 2)
    write_whole(tmp_path / "new", "")
    assert (tmp_path / "adapter").stat().st_mode == (tmp_path / "folder").stat().st_mode
    for file in (tmp_path / "new", tmp_path / "adapter" / "adapter_config.json"):
        assert file.stat().st_mode == (tmp_path / "file").stat().st_mode


def test_a_symbolic_link_stays_one(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    save(link, 3)
    assert link.is_symlink() and rank_in(folder) == 3
    (tmp_path / "ahead").symlink_to(tmp_path / "not" / "yet")
    save(tmp_path / "ahead", 4)
    assert rank_in(tmp_path / "not" / "yet") == 4
    (tmp_path / "scores").symlink_to(folder / "evaluation.json")
    write_whole(tmp_path / "scores", "{}")
    assert (tmp_path / "scores").is_symlink() and (folder / "evaluation.json").read_text() == "{}"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_no_file_of_another_librarys_adapter_stays(folder, can_exchange, request):
    if not can_exchange:
        request.getfixturevalue("no_exchange")
    for name in ("adapters.safetensors", "adapter_model.bin"):
        (folder / name).write_text("another's")
    save(folder, 3)
    assert names(folder) == ALL and rank_in(folder) == 3
    assert_users_things_are_there(folder)


def test_what_cannot_be_linked_is_copied_or_the_files_go_one_by_one(folder, monkeypatch):
    for number in (errno.EPERM, errno.EOPNOTSUPP):  # another user's file; a file system without links

        def refuse(*_, number=number, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", refuse)
        save(folder, number)
        assert rank_in(folder) == number and names(folder) == ALL
        assert_users_things_are_there(folder)


def test_a_parent_that_cannot_be_written_to(folder, monkeypatch):
    """The folder itself can be: it is a mount point, or an administrator made it."""
    make = staging.tempfile.mkdtemp

    def only_inside(prefix, dir):
        if Path(dir) == folder.parent:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return make(prefix=prefix, dir=dir)

    monkeypatch.setattr(staging.tempfile, "mkdtemp", only_inside)
    save(folder, 3)
    assert rank_in(folder) == 3 and names(folder) == ALL
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    save(folder, 4)
    assert rank_in(folder) == 4 and names(folder) == ALL


def refused(path: Path, rank: int = 3) -> str:
    with pytest.raises(CheckpointError) as caught:
        save(path, rank)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_full_disk(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # the system's own error, in the middle of a file
    try:
        assert "cannot be written: File too large; what was there is as it was" in refused(folder)
        with pytest.raises(CheckpointError, match=r"the file .*scores cannot be written: File too large"):
            write_whole(folder / "scores", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert rank_in(folder) == 2 and names(folder) == ALL and names(folder.parent) == {"adapter"}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_error_at_any_change_leaves_the_old_adapter_or_the_new_one(folder, can_exchange, request, monkeypatch):
    """The disk is full, or removed, before the n-th change of a name: our error is raised, or all is in place."""
    if not can_exchange:
        request.getfixturevalue("no_exchange")
    real = {name: getattr(os, name) for name in ("rename", "link", "mkdir", "open")}
    reasons: list[str] = []
    for moment in range(1, 100):
        left = moment

        def change(name, *arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real[name](*arguments, **options)

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, lambda *a, name=name, **k: change(name, *a, **k))
            try:
                save(folder, 3)
                expected = 3
            except CheckpointError as error:
                reasons.append(str(error))
                expected = 2
        assert rank_in(folder) == expected
        assert_users_things_are_there(folder)
        save(folder, 2)
        assert names(folder) == ALL and names(folder.parent) == {"adapter"}
        if left > 0:
            break
    assert reasons and all("cannot be written: No space left" in reason for reason in reasons)
    assert moment > 10 and left > 0


def test_places_where_no_folder_can_be(folder, tmp_path):
    assert "it is a file, a folder is expected" in refused(folder / "README.md")
    assert "Not a directory" in refused(folder / "README.md" / "deeper" / "still")
    assert "File name too long" in refused(tmp_path / ("n" * 300))
    assert "null" in refused(Path("a\0b"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop")
    refused(Path("/proc/no/such"))
    assert rank_in(folder) == 2 and names(tmp_path) == {"runs", "loop"}
    with pytest.raises(CheckpointError, match="it is a folder, a file is expected"):
        write_whole(folder, "text")
    with pytest.raises(CheckpointError, match=r"README\.md/scores cannot be written: "):
        write_whole(folder / "README.md" / "scores", "text")


def test_a_folder_that_vanishes_meanwhile(folder, tmp_path):
    def vanishing():
        with replacing(folder) as new:
            (tmp_path / "runs").rename(tmp_path / "elsewhere")
            (new / "file").write_text("text")

    with pytest.raises(CheckpointError, match=r"runs/adapter cannot be written: No such file"):
        vanishing()
    assert rank_in(tmp_path / "elsewhere" / "adapter") == 2


def test_another_exception_passes_through_and_changes_nothing(folder):
    def interrupted(path):
        with replacing_adapter(path) as new:
            write_peft(new, adapter(3))
            raise KeyboardInterrupt

    for path in (folder, folder.parent / "new" / "one"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(path)
    assert rank_in(folder) == 2 and names(folder) == ALL and names(folder.parent) == {"adapter"}


def test_a_model_card_that_is_there_stays_and_a_first_one_comes(folder, tmp_path):
    for path in (folder, tmp_path / "other"):
        with replacing_adapter(path) as new:
            write_peft(new, adapter(3))
            (new / "README.md").write_text("a blank one")
    assert (folder / "README.md").read_text() == "mine"
    assert (tmp_path / "other" / "README.md").read_text() == "a blank one"


def test_the_folder_of_a_living_process_is_not_removed(folder):
    """Left-over folders of dead processes are removed; here this process is the living one."""
    dead = folder.parent / f"{staging.PREFIX}dead"
    (dead / "new").mkdir(parents=True)
    with replacing_adapter(folder) as new:
        write_peft(new, adapter(3))
        (new / "lora_one.json").write_text(json.dumps({"rank": 3}))
        save(folder, 4)  # as another process would, meanwhile
        assert rank_in(folder) == 4 and new.is_dir() and not dead.exists()
    assert rank_in(folder) == 3


def test_many_at_once(folder):
    """The adapter that is saved last stays, whole."""
    errors = []

    def several(rank):
        try:
            for _ in range(10):
                save(folder, rank)
                assert rank_in_any(folder) in (1, 2, 3, 4)
        except BaseException as error:
            errors.append(error)

    def rank_in_any(path):
        """Read one file only: another save may come between two. The whole folder is read at the end."""
        return json.loads((path / "lora_one.json").read_text())["rank"]

    threads = [threading.Thread(target=several, args=[rank]) for rank in (1, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and rank_in(folder) in (1, 3, 4)
    assert names(folder) == ALL and names(folder.parent) == {"adapter"}
    assert_users_things_are_there(folder)


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_whole(tmp_path / "pipe", "text")
    reader.join()
    assert read == ["text"]


def test_a_file_keeps_its_rights(tmp_path):
    file = tmp_path / "report.json"
    file.write_text("old")
    file.chmod(0o600)
    with replacing_file(file) as new:
        new.write_text("new")
    assert file.read_text() == "new" and stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="exchanges names there only")
def test_exchange(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "said").write_text(name)
    exchange(tmp_path / "one", tmp_path / "other")
    assert [(tmp_path / name / "said").read_text() for name in ("one", "other")] == ["other", "one"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "none")
