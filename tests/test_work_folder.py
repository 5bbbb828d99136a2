"""The folder of an interrupted run: what it keeps, what it refuses, and how its output appears."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kbvq.storage.files
from kbvq.cli import main
from kbvq.errors import CheckpointError
from kbvq.storage.files import write_json, write_tensors
from kbvq.storage.work_folder import WorkFolder, verify_state


@dataclass(frozen=True)
class Bank:
    path: str
    size: int


FINGERPRINT = {"recipe": {"bits": 2.25, "name": "fast"}, "model": {"a.safetensors": {"bytes": 3, "sha256": "ab"}}}


def interrupted(output, fingerprint=FINGERPRINT):
    """The work folder that a run leaves which was interrupted behind its second step; and what it carried."""
    with WorkFolder(output) as work:
        assert not work.resume(fingerprint, (Bank,))
        teacher = work.empty((4, 5), torch.float32)
        teacher[:] = torch.arange(20.0).view(4, 5)
        work.commit({"teacher": teacher, "student": teacher}, {"step": 0})
        student = work.empty_like(teacher)
        student[:] = 7
        banks = {Bank("model.layers.0", 3): {(2, 0): 0.1 + 0.2}, Bank("b", 1): {(3, 1): float("inf")}}
        file = work.store("banks.safetensors", lambda path: write_tensors(path, {"codes": torch.arange(3)}))
        carry = {"teacher": teacher, "student": student, "same": [teacher], "banks": banks}
        carry |= {"small": (torch.ones(2, dtype=torch.bfloat16), None, True, "text"), "files": [file]}
        work.commit(carry, {"step": 1})
        return work.path, carry


def checkpoint(work, content="new"):
    """A packed checkpoint in the work folder, as small as can be."""
    write_json(work.checkpoint / "config.json", {"quantization_config": {"quant_method": "kbvq"}, "content": content})
    write_json(work.checkpoint / "kbvq_manifest.json", {"files": {}, "content": content})


def finished(output, content="new", **options):
    with WorkFolder(output, **options) as work:
        work.resume(FINGERPRINT, ())
        work.commit({}, {})
        checkpoint(work, content)
        work.complete()
    return output


def written(output):
    return json.loads((output / "config.json").read_text())["content"]


def test_a_run_goes_on_with_exactly_what_was_carried(tmp_path):
    path, carried = interrupted(tmp_path / "out")
    with WorkFolder(tmp_path / "out") as work:
        assert not work.resume(FINGERPRINT, (Bank,))
        assert work.done == 2
        carry = work.carry
        assert carry["banks"] == carried["banks"] and carry["files"] == carried["files"]
        assert list(carry["banks"]) == list(carried["banks"])
        assert torch.equal(carry["teacher"], torch.arange(20.0).view(4, 5)) and torch.equal(
            carry["student"], torch.full((4, 5), 7.0)
        )
        assert carry["same"][0] is carry["teacher"] and carry["student"] is not carry["teacher"]
        assert torch.equal(carry["small"][0], torch.ones(2, dtype=torch.bfloat16)) and carry["small"][1:] == (
            None,
            True,
            "text",
        )
        assert torch.equal(load_file(path / carry["files"][0].name)["codes"], torch.arange(3))
    assert [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_files_of_earlier_and_of_interrupted_steps_are_deleted(tmp_path):
    path, _ = interrupted(tmp_path / "out")
    kept = sorted(os.listdir(path))
    with WorkFolder(tmp_path / "out") as work:
        work.resume(FINGERPRINT, (Bank,))
        work.empty((3,), torch.float32)
        (path / "state.json.writing").write_text("{")
        (path / "checkpoint" / "model-00001-of-00002.safetensors").write_text("half")
        with open(path / "metrics.jsonl", "a") as stream:
            stream.write('{"step": 2}\n{"st')
    with WorkFolder(tmp_path / "out") as work:
        work.resume(FINGERPRINT, (Bank,))
        assert sorted(os.listdir(path)) == kept and not os.listdir(path / "checkpoint")
        assert len((path / "metrics.jsonl").read_text().splitlines()) == 2
        student = work.carry["student"]
        work.commit({"student": student}, {})
        assert torch.equal(student, torch.full((4, 5), 7.0))
    assert verify_state(path)["files"].keys() == {"activations-00001.bin"}
    assert not (path / "banks.safetensors").exists()


def test_released_pages_come_back_as_they_were(tmp_path):
    with WorkFolder(tmp_path / "out") as work:
        work.resume(FINGERPRINT, ())
        tensor = work.empty((1000, 100), torch.float32)
        expected = torch.rand(1000, 100)
        for start in range(0, 1000, 100):
            tensor[start : start + 100] = expected[start : start + 100]
            work.release()
        assert torch.equal(tensor, expected)


def test_scratch_is_zeros_in_a_file_without_a_name(tmp_path):
    path, _ = interrupted(tmp_path / "out")
    with WorkFolder(tmp_path / "out") as work:
        work.resume(FINGERPRINT, (Bank,))
        kept, opened = sorted(os.listdir(path)), len(os.listdir("/proc/self/fd"))
        scratch = work.scratch(64, 256, 256)
        assert scratch.shape == (64, 256, 256) and scratch.dtype == torch.float32 and not scratch.any()
        scratch[1].fill_(2)
        work.release()
        assert scratch.sum() == 2 * 256 * 256 and sorted(os.listdir(path)) == kept
        del scratch
        assert len(os.listdir("/proc/self/fd")) == opened


def resume(output, fingerprint=FINGERPRINT, **options):
    with WorkFolder(output) as work:
        work.resume(fingerprint, (Bank,), **options)
        return work.done


def test_state_of_something_else_is_refused_by_name_and_fresh_starts_anew(tmp_path):
    path, _ = interrupted(tmp_path / "out")
    before = (path / "state.json").read_bytes()
    other = {"recipe": {"bits": 2.5, "name": "fast"}, "model": {"a.safetensors": {"bytes": 3, "sha256": "cd"}}, "x": 1}
    with pytest.raises(CheckpointError) as caught:
        resume(tmp_path / "out", other)
    for part in ("recipe.bits was 2.25 and is 2.5", 'model.a.safetensors.sha256 was "ab" and is "cd"', "--fresh"):
        assert part in str(caught.value)
    assert "recipe.name" not in str(caught.value)
    assert (path / "state.json").read_bytes() == before
    assert resume(tmp_path / "out", other, fresh=True) == 0
    assert not path.exists()  # nothing was finished, so nothing is left


def test_state_of_another_version_is_refused(tmp_path):
    path, _ = interrupted(tmp_path / "out")
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"state_version": 99}))
    with pytest.raises(CheckpointError, match=r"state\.json has version 99, this kbvq reads 1"):
        resume(tmp_path / "out")


def test_every_flipped_or_missing_byte_of_the_state_is_found(tmp_path, capsys):
    path, _ = interrupted(tmp_path / "out")
    assert main(["verify", str(path)]) == 0
    assert "2 steps done" in capsys.readouterr().out
    names = ["state.json", *verify_state(path)["files"]]
    assert len(names) == 5
    for name in names:
        content = (path / name).read_bytes()
        for place in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
            flipped = bytearray(content)
            flipped[place] ^= 1
            (path / name).write_bytes(flipped)
            with pytest.raises(CheckpointError, match=name):
                resume(tmp_path / "out")
            assert main(["verify", str(path)]) == 2
            assert name in capsys.readouterr().err
        (path / name).write_bytes(content[:-1])
        if name != "state.json":  # whose last byte is a line break
            with pytest.raises(CheckpointError, match=f"{name} is damaged"):
                resume(tmp_path / "out")
            (path / name).unlink()
            with pytest.raises(CheckpointError, match=f"{name} is missing"):
                resume(tmp_path / "out")
        (path / name).write_bytes(content)
    assert resume(tmp_path / "out") == 2


def test_second_run_into_the_same_output_is_refused(tmp_path):
    with WorkFolder(tmp_path / "out") as work:
        with pytest.raises(CheckpointError, match=rf"another run \(process {os.getpid()} on .*\) is writing .*out"):
            WorkFolder(tmp_path / "out")
        work.resume(FINGERPRINT, ())
    assert finished(tmp_path / "out")


def test_full_disk_is_an_error_that_keeps_the_state(tmp_path, monkeypatch):
    path, _ = interrupted(tmp_path / "out")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, act in (
        ("posix_fallocate", lambda work: work.empty((8,), torch.float32)),
        ("posix_fallocate", lambda work: work.scratch(2, 4)),
        ("fsync", lambda work: work.commit({"small": torch.ones(3)}, {})),
        ("replace", lambda work: work.commit({}, {})),
    ):
        with WorkFolder(tmp_path / "out") as work:
            work.resume(FINGERPRINT, (Bank,))
            with monkeypatch.context() as patch:
                patch.setattr(kbvq.storage.files.os, name, full)
                with pytest.raises(CheckpointError, match=r"out\.partial.*No space left on device.*goes on from there"):
                    act(work)
        assert resume(tmp_path / "out") == 2


def test_output_that_is_not_empty_is_refused_before_anything_is_written(tmp_path):
    out = finished(tmp_path / "out")
    with pytest.raises(CheckpointError, match="not empty; pass --overwrite"):
        WorkFolder(out)
    assert written(out) == "new" and os.listdir(tmp_path) == ["out"]


def test_empty_output_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    assert written(finished(tmp_path / "empty")) == "new"
    assert written(finished(tmp_path / "a" / "b")) == "new"
    assert sorted(os.listdir(tmp_path)) == ["a", "empty"]


def test_output_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(CheckpointError, match="is a file"):
        WorkFolder(tmp_path / "file", overwrite=True)
    with pytest.raises(CheckpointError, match="cannot be created"):
        WorkFolder(tmp_path / "file" / "out")


def test_overwrite_deletes_only_packed_checkpoints(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="not a packed checkpoint"):
        WorkFolder(tmp_path, overwrite=True)


def test_overwrite_replaces_the_old_checkpoint_only_at_the_end(tmp_path):
    out = finished(tmp_path / "out", "old")
    (out / "note.txt").write_text("old")
    with WorkFolder(out, overwrite=True) as work:
        work.resume(FINGERPRINT, ())
        work.commit({}, {})
        checkpoint(work)
        assert written(out) == "old"
        work.complete()
    assert written(out) == "new" and not (out / "note.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("stop", ["before", "between", "after"])
def test_replacement_that_is_interrupted_is_completed_by_the_next_run(tmp_path, monkeypatch, stop):
    out, rename, seen = finished(tmp_path / "out", "old"), Path.rename, []

    class Killed(BaseException):
        pass

    def interrupted_rename(self, target):
        seen.append(self)
        if (stop, len(seen)) in (("before", 1), ("between", 2)):
            raise Killed
        rename(self, target)
        if (stop, len(seen)) == ("after", 2):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted_rename)
        with pytest.raises(Killed):
            finished(out, overwrite=True)
    assert out.exists() == (stop != "between")
    with WorkFolder(out, overwrite=True) as work:
        assert work.resume(FINGERPRINT, ())
        work.move_to_output()
    assert written(out) == "new" and os.listdir(tmp_path) == ["out"]


def test_killed_at_any_deletion_after_its_end_a_run_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    """The output is whole then; the next run finishes the clean-up, or says that the output is there, as always."""

    class Killed(BaseException):
        pass

    def deletes(original):
        def delete(path, *arguments, **options):
            if Path(path).parent == out.with_name(out.name + ".partial") or Path(path).suffix == ".partial":
                count.append(path)
                if len(count) == fatal:
                    raise Killed
            return original(path, *arguments, **options)

        return delete

    answers = []
    for fatal in range(1, 10):
        out, count = tmp_path / str(fatal) / "out", []
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", deletes(Path.unlink))
            patch.setattr(Path, "rmdir", deletes(Path.rmdir))
            patch.setattr(WorkFolder, "_let_go", lambda work: os.close(work._lock))  # as when a process is gone
            try:
                finished(out)
                break
            except Killed:
                pass
        try:
            with WorkFolder(out) as work:
                assert work.resume(FINGERPRINT, ())
                work.move_to_output()
            answers.append("finished")
        except CheckpointError as error:
            assert "is not empty; pass --overwrite" in str(error)
            answers.append("refused")
        assert written(out) == "new" and os.listdir(out.parent) == ["out"]
    assert answers == ["finished", "finished", "refused", "refused"]  # metrics, state, marker, folder


def test_fresh_puts_an_old_checkpoint_back_that_was_being_replaced(tmp_path):
    out = finished(tmp_path / "out", "old")
    interrupted(tmp_path / "other")
    (tmp_path / "other.partial").rename(tmp_path / "out.partial")
    out.rename(tmp_path / "out.partial" / "replaced")
    resume(out, fresh=True)
    assert written(out) == "old"


def test_old_checkpoint_is_put_back_when_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    out, rename = finished(tmp_path / "out", "old"), Path.rename

    def failing(self, target):
        if self.name == "checkpoint":
            raise OSError("cross-device link")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(CheckpointError, match=r"cross-device link.*out\.partial"):
            finished(out, overwrite=True)
    assert written(out) == "old"
    with WorkFolder(out, overwrite=True) as work:
        assert work.resume(FINGERPRINT, ())
        work.move_to_output()
    assert written(out) == "new"


def test_partial_folder_of_somebody_else_is_kept(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("kept")
    with pytest.raises(CheckpointError, match="was not made by kbvq"):
        WorkFolder(tmp_path / "out")
    assert (tmp_path / "out.partial" / "precious").read_text() == "kept"


def test_shard_that_changed_after_it_was_written_is_found_at_the_end(tmp_path):
    with WorkFolder(tmp_path / "out") as work:
        work.resume(FINGERPRINT, ())
        shard = work.store("checkpoint/model.safetensors", lambda path: write_tensors(path, {"a": torch.ones(3)}))
        work.commit({"shards": [shard]}, {})
        fingerprint = {"bytes": 1, "sha256": "other"}
        write_json(work.checkpoint / "kbvq_manifest.json", {"files": {"model.safetensors": fingerprint}})
        with pytest.raises(CheckpointError, match=r"model\.safetensors changed after it was written"):
            work.complete()
