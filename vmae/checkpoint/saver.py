"""Writing of checkpoints by all ranks, at once or in the background: complete or absent, whatever happens.

Each tensor is copied and written once in the world: where ranks hold copies of the whole model, each of them
takes a share of the tensors, so neither host memory nor planning grows with the number of ranks.

A checkpoint is written to `.checkpoint-N.unfinished/`, every file forced to the disk, then the manifest; and
when every rank is done, rank 0 renames the folder. Only then are older ones deleted.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import MANIFEST, NamedTensors, file_facts, make_manifest
from vmae.errors import InputError
from vmae.files.atomic import sync_folder, why_not_written


class Ranks(Protocol):
    """Interface to the processes of a run, as saving uses it; `vmae.train.parallel.Parallel` has it."""

    rank: int
    world_size: int
    save_group: Any

    @property
    def copy(self) -> tuple[int, int]: ...

    @property
    def is_main(self) -> bool: ...

    def gather(self, value: Any, group: Any = None) -> list[Any]: ...


class OneProcess:
    """The only process of a run."""

    rank, world_size, is_main, save_group, copy = 0, 1, True, None, (0, 1)

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        return [value]


def bytes_of(value: Any) -> int:
    """Of a whole tensor, on all ranks; 0 of anything else."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def share_of(tensors: NamedTensors, copy: int, copies: int) -> NamedTensors:
    """What the ranks of one of several copies of the model write: in order, each tensor goes to the copy that
    has the fewest bytes so far. Groups without a tensor are left out."""
    loads = [0] * copies
    found: NamedTensors = {}
    for group, values in tensors.items():
        for name, value in values.items():
            taker = loads.index(min(loads))
            loads[taker] += bytes_of(value)
            if taker == copy:
                found.setdefault(group, {})[name] = value
    return found


def on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


_NUMBERS = itertools.count()


def _caching_planner() -> type[dcp.DefaultSavePlanner]:
    """torch's planner, whose plans are agreed on once and hold while tensors, shapes and ranks stay. It keeps
    them for the whole process by the name of its class: each run has a class of its own."""
    return type(f"SavePlanner{next(_NUMBERS)}", (dcp.DefaultSavePlanner,), {})


class Saver:
    """Saves the checkpoints of a run. Every rank has one, and they are called together.

    Args:
        folder: of the run.
        parallel: this rank.
        background: copy the tensors to host memory, and write them while training goes on; the next save
            waits for it.
    """

    def __init__(
        self, folder: CheckpointFolder, parallel: Ranks | None = None, *, background: bool = False
    ) -> None:
        self.folder, self.parallel, self.background = folder, parallel or OneProcess(), background
        self._writing: threading.Thread | None = None
        self._error: InputError | None = None
        self._wanted = 0  # bytes of the tensors that are being written
        self._planner = _caching_planner()
        self._stager: DefaultStager | None = None

    def save(self, step: int, tensors: NamedTensors, about: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, then delete those that are too old.

        Args:
            about: plain containers for the manifest; `config` among them.

        Raises:
            InputError: this one, or an earlier one in the background, can't be written; the complete ones are
                all still there.
        """
        self.finish()
        path = self.folder.path_of(step)
        beside = path.with_name(f".{path.name}.unfinished")
        held = [value for group in tensors.values() for value in group.values()]
        self._wanted = sum(map(bytes_of, held))
        self._together(lambda: self._make_room(beside) if self.parallel.is_main else None, path)
        where: dict[str, Any] = dict(
            storage_writer=dcp.FileSystemWriter(beside),
            planner=self._planner(enable_plan_caching=True),
            process_group=self._group,
            no_dist=self._group is None,
        )
        share = share_of(tensors, *self.parallel.copy)
        if not self.background:
            self._together(lambda: dcp.save(share, **where), path)
            self._complete(beside, path, step, about)
            return
        if any(map(on_gpu, held)):
            where["async_stager"] = self._pinned_stager()
        done = dcp.async_save(share, **where)
        assert isinstance(done, Future)  # another class comes with an asynchronous stager only

        def complete() -> None:
            try:
                self._together(done.result, path)
                self._complete(beside, path, step, about)
            except InputError as error:
                self._error = error

        self._writing = threading.Thread(target=complete, name="checkpoint")
        self._writing.start()

    def finish(self) -> None:
        """Wait for the save in the background, if there is one.

        Raises:
            InputError: it could not be written.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _pinned_stager(self) -> DefaultStager:
        """Page-locked memory for the copies, taken once: copying to it runs at the bus's speed."""
        if self._stager is None:
            options = StagingOptions(
                use_pinned_memory=True,
                use_shared_memory=False,  # a thread of this process writes
                use_async_staging=False,  # the next step changes the tensors
                use_non_blocking_copy=True,
            )
            self._stager = DefaultStager(options)
        return self._stager

    def close(
        self, kind: type | None = None, error: BaseException | None = None, trace: object = None
    ) -> None:
        """`finish`, as the end of a `with`: an earlier error is not covered by one of the save."""
        try:
            self.finish()
        except InputError:
            if error is None:
                raise
        finally:
            if self._stager is not None:
                self._stager.close()
                self._stager = None

    @property
    def _group(self) -> Any:
        return self.parallel.save_group

    def _together(self, work: Callable[[], Any], path: Path) -> None:
        """Do `work` on every rank; an error on any of them is an error on all, and the unfinished folder
        goes."""
        failure: BaseException | None = None
        try:
            work()
        except dcp.CheckpointException as error:
            failure = next(iter(error.failures.values()))[0]
        except (OSError, RuntimeError, InputError) as error:  # torch reports a full disk as either
            failure = error
        failures = self.parallel.gather(failure is not None, self._group)
        if not any(failures):
            return
        if self.parallel.is_main and (beside := path.with_name(f".{path.name}.unfinished")).exists():
            shutil.rmtree(beside, ignore_errors=True)
            if isinstance(failure, InputError):
                # The folder is the run's no more: torch's writer may have made it again.
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
        # After the removal: the message tells the free space.
        text = None if failure is None else self._describe(failure, path)
        raise InputError(next(text for text in self.parallel.gather(text, self._group) if text))

    def _describe(self, failure: BaseException, path: Path) -> str:
        if isinstance(failure, InputError):
            return str(failure)
        if not path.parent.is_dir():
            return (
                f"cannot write {path}: output folder {path.parent} is gone, removed, renamed or unmounted "
                "during the run"
            )
        reason = why_not_written(failure, path, self._wanted)
        newest = self.folder.describe_latest()
        return f"cannot write {path}: {reason}; the earlier checkpoints are untouched: {newest}"

    def _make_room(self, beside: Path) -> None:
        for left_over in self.folder.unfinished():
            if left_over.is_dir():
                shutil.rmtree(left_over, ignore_errors=True)
            else:
                left_over.unlink(missing_ok=True)
        self.folder.check()
        beside.mkdir()  # without parents: where the run's folder has gone, nobody makes it again

    def _complete(self, beside: Path, path: Path, step: int, about: dict[str, Any]) -> None:
        """Write down what the files hold, give the folder its name, and delete what is too old."""
        own: dict[str, dict[str, Any]] = {}

        def hash_own() -> None:
            for file in beside.iterdir():
                shard, mine = file.name.startswith("__"), file.name.startswith(f"__{self.parallel.rank}_")
                if mine or (self.parallel.is_main and not shard):
                    own[file.name] = file_facts(file)

        self._together(hash_own, path)
        files = {
            name: facts for rank in self.parallel.gather(own, self._group) for name, facts in rank.items()
        }

        def publish() -> None:
            if self.parallel.is_main:
                text = make_manifest(files, step, self.parallel.world_size, about)
                with open(beside / MANIFEST, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                sync_folder(beside)
                self.folder.check()
                if path.exists():  # of the same step, which a resumed run writes again
                    self.folder.remove(path)
                os.replace(beside, path)
                sync_folder(path.parent)
                self.folder.prune()

        self._together(publish, path)
