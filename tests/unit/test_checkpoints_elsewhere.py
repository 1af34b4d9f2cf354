"""Checkpoints that lie on another disk than their run, behind a link."""

import errno
import os
from pathlib import Path

from megacpp_stp.runs.checkpoints import latest_checkpoint, settle_checkpoints


def test_what_is_newer_than_the_checkpoint_is_moved_aside_on_its_disk(tmp_path, monkeypatch):
    run, disk, aside, rename = tmp_path / "run", tmp_path / "disk", tmp_path / "run" / "attempt-1", os.rename
    for iteration, last in ((4, "{}"), (8, "")):
        folder = disk / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(last)
    aside.mkdir(parents=True)
    (run / "checkpoints").symlink_to(disk)

    def within_a_disk(source, target):
        if disk in Path(source).resolve().parents and disk not in Path(target).resolve().parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", within_a_disk)
    assert latest_checkpoint(run) == 4
    settle_checkpoints(run, iteration=4, aside=aside)
    assert sorted(path.name for path in disk.iterdir()) == [
        "attempt-1",
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
    ]
    assert (disk / "attempt-1" / "iter_0000008" / "metadata.json").exists()
    assert latest_checkpoint(run) == 4
