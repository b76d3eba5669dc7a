"""Files are written aside and renamed into place, and a full disk loses nothing."""

import os
from pathlib import Path
from threading import Thread

import pytest
from safetensors import SafetensorError

from sparsity_utils import paths
from sparsity_utils.console import InputError


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "table.csv"
    with paths.written_aside(target) as aside:
        aside.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole" and os.listdir(target.parent) == ["table.csv"]
    with pytest.raises(ZeroDivisionError), paths.written_aside(target) as aside:
        aside.write_text("half")
        1 / 0  # noqa: B018
    assert target.read_text() == "whole" and os.listdir(target.parent) == ["table.csv"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "corpus"
    for name in ("first", "second"):
        with paths.written_aside(target) as aside:
            aside.mkdir()
            (aside / name).touch()
    assert os.listdir(target) == ["second"] and os.listdir(tmp_path) == ["corpus"]


def full_device(aside: Path) -> None:
    """Write to the device that is always full."""
    os.symlink("/dev/full", aside)
    aside.write_text("x" * 100_000)


def full_for_safetensors(aside: Path) -> None:
    """What safetensors raised on a full file system (its error carries no errno)."""
    aside.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write", [full_device, full_for_safetensors])
def test_a_full_disk_is_said_and_loses_nothing(tmp_path, write):
    target = tmp_path / "kept"
    target.write_text("before")
    said = r"The disk is full: .*kept could not be written and was left as it was; free some space"
    with pytest.raises(InputError, match=said), paths.written_aside(target) as aside:
        write(aside)
    assert target.read_text() == "before" and os.listdir(tmp_path) == ["kept"]


def test_another_error_passes_as_it_is(tmp_path):
    with pytest.raises(PermissionError), paths.written_aside(tmp_path / "x"):
        raise PermissionError(13, "no")


def test_the_build_folder_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path))
    assert paths.build() == tmp_path
    assert paths.runs().parent == paths.corpora().parent == paths.profile_output("laptop").parent == tmp_path
    monkeypatch.setenv("SPARSITY_BUILD", "elsewhere")  # the same folder wherever a kernel runs
    assert paths.build() == paths.ROOT / "elsewhere"


def test_who_waits_for_another_process_says_so_and_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paths, "PATIENCE", 0.05)
    target, went_on = tmp_path / "table.csv", []

    def second():
        with paths.locked(target):
            went_on.append(True)

    with paths.locked(target):
        assert capsys.readouterr().err == ""
        other = Thread(target=second)
        other.start()
        other.join(0.5)
        assert other.is_alive() and not went_on
        told = capsys.readouterr().err
        said = r"Another process writes .*table\.csv; wait until it ends"
        with pytest.raises(InputError, match=said), paths.locked(target, wait=False):
            pass
    other.join(20)
    assert went_on and told == f"Another process is at work on {target}; this one goes on when it ends.\n"
