"""Memory, cores and open files that a container allows, from control groups of both versions: real ones where
the system lets a test make one, files in their format otherwise."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vmae.files.limits import (
    CONTAINER,
    MACHINE,
    MemoryRoom,
    OpenFiles,
    find_cores,
    find_memory,
    find_open_files,
    free_disk,
    raise_open_files,
    whole_cores,
)

GIB = 2**30
MEMINFO = f"MemTotal:       {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable:   {12 * GIB // 1024} kB\n"


def make_root(root, group, files):
    """A folder that stands for /: `group` is /proc/self/cgroup, `files` are below /sys/fs/cgroup."""
    texts = {"proc/self/cgroup": group, "proc/meminfo": MEMINFO}
    texts |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def version_2(limit, used, stat="active_file 0\ninactive_file 0\n", cpu="max 100000"):
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": stat,
        "cpu.max": cpu + "\n",
    }


def below(folder, files):
    return {f"{folder}/{name}": text for name, text in files.items()}


def test_version_2_in_a_container(tmp_path):
    """The container's group is the root of what it sees; pages of files can be given up."""
    stat = f"anon 5\nfile 7\nactive_file {GIB}\ninactive_file {GIB // 2}\nshmem 9\n"
    root = make_root(tmp_path, "0::/\n", version_2(4 * GIB, 3 * GIB, stat, cpu="150000 100000"))
    assert find_memory(root) == MemoryRoom(4 * GIB, 4 * GIB - 3 * GIB + 3 * GIB // 2, CONTAINER)
    assert find_cores(root) == min(1.5, len(os.sched_getaffinity(0)))


def test_version_2_without_a_limit(tmp_path):
    root = make_root(tmp_path, "0::/user.slice\n", below("user.slice", version_2("max", 5)))
    assert find_memory(root) == MemoryRoom(16 * GIB, 12 * GIB, MACHINE)
    assert find_cores(root) == len(os.sched_getaffinity(0))


def test_the_tightest_group_around_counts(tmp_path):
    """Slurm: a job's group has the limit, a step's below it has none."""
    files = below("slurm/job_1", version_2(2 * GIB, GIB, cpu="50000 100000"))
    files |= below("slurm/job_1/step_0", version_2("max", GIB // 2))
    files |= below("slurm", version_2(8 * GIB, 3 * GIB))
    root = make_root(tmp_path, "0::/slurm/job_1/step_0\n", files)
    assert find_memory(root) == MemoryRoom(2 * GIB, GIB, CONTAINER)
    assert find_cores(root) == 0.5


@pytest.mark.parametrize("inside", [True, False])
def test_version_1(tmp_path, inside):
    """In a container, the path is the host's and not there: the mount's root is the container's group."""
    group = "/docker/0f" if not inside else "/"
    place = "/docker/0f" if not inside else ""
    files = below(
        f"memory{place}",
        {
            "memory.limit_in_bytes": f"{4 * GIB}\n",
            "memory.usage_in_bytes": f"{2 * GIB}\n",
            "memory.stat": f"active_file 1\ntotal_active_file {GIB}\ntotal_inactive_file 0\n",
        },
    )
    files |= below(f"cpu,cpuacct{place}", {"cpu.cfs_quota_us": "25000\n", "cpu.cfs_period_us": "100000\n"})
    told = f"5:cpu,cpuacct:{'/docker/0f'}\n4:memory:/docker/0f\n0::{group}\n"
    root = make_root(tmp_path, told, files)
    assert find_memory(root) == MemoryRoom(4 * GIB, 3 * GIB, CONTAINER)
    assert find_cores(root) == 0.25


def test_version_1_without_a_limit(tmp_path):
    files = below(
        "memory", {"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": "5\n"}
    )
    files |= below("cpu", {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"})
    root = make_root(tmp_path, "2:cpu:/\n1:memory:/\n", files)
    assert find_memory(root) == MemoryRoom(16 * GIB, 12 * GIB, MACHINE)
    assert find_cores(root) == len(os.sched_getaffinity(0))


def test_more_used_than_allowed(tmp_path):
    root = make_root(tmp_path, "0::/\n", version_2(GIB, 2 * GIB))
    assert find_memory(root).free == 0


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/../x\n"])
def test_a_system_that_tells_nothing(tmp_path, text):
    root = make_root(tmp_path, text, {"memory.max": "what\n", "cpu.max": "\n", "memory.current": "1"})
    (root / "proc/meminfo").write_text("")
    assert find_memory(root) is None and find_cores(root) == len(os.sched_getaffinity(0))
    assert find_memory(tmp_path / "nowhere") is None


def test_this_machine():
    found = find_memory()
    assert 0 < found.free <= found.total and find_cores() > 0
    assert free_disk("/") > 0 and free_disk("/no/such/folder") == pytest.approx(free_disk("/"), rel=0.1)


def test_a_real_group_limits_memory():
    folders = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
    name = f"vmae-test-{os.getpid()}"
    for parent, limit in zip(folders, ("memory.limit_in_bytes", "memory.max")):
        group = parent / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(512 << 20))
            code = (
                f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
                "from vmae.files.limits import find_memory\nprint(*find_memory(), sep=',')"
            )
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        except OSError:
            continue
        finally:
            group.rmdir()
        total, free, where = done.stdout.strip().split(",")
        assert int(total) == 512 << 20 and 0 < int(free) <= int(total) and where == CONTAINER
        return
    pytest.skip("no control group can be made here")


def test_open_files_are_raised_and_never_lowered():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limits():
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))

    code = (
        "from vmae.files.limits import find_open_files, raise_open_files\n"
        "for needed in (50, 150, 120, 300, 300): raise_open_files(needed); print(*find_open_files())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limits)
    said = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert said == [(100, 200), (150, 200), (150, 200), (200, 200), (200, 200)], done.stderr
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_no_limit_of_open_files(monkeypatch):
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: infinite)
    assert find_open_files() == OpenFiles(2**63 - 1, 2**63 - 1)
    raise_open_files(10**6)


@pytest.mark.parametrize(("cores", "processes"), [(0.5, 1), (2.7, 2), (64, 64)])
def test_processes_for_a_share_of_cores(monkeypatch, cores, processes):
    monkeypatch.setattr("vmae.files.limits.find_cores", lambda: cores)
    assert whole_cores() == processes
