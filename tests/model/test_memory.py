"""Free memory, as the machine and the groups that hold a process say it."""

from pathlib import Path

import pytest

from nvvl.model.memory import free_memory

MB = 10**6
PROC = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/memory.max": str(3000 * MB),
    "sys/fs/cgroup/job/memory.current": str(1200 * MB),
    "sys/fs/cgroup/job/memory.stat": f"anon 7\nactive_file {50 * MB}\ninactive_file {150 * MB}\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
    "sys/fs/cgroup/job/step/memory.current": str(1000 * MB),
}
V1 = {
    "proc/self/cgroup": "4:cpu,cpuacct:/\n3:memory:/box\n0::/\n",
    "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(2000 * MB),
    "sys/fs/cgroup/memory/box/memory.usage_in_bytes": str(600 * MB),
    "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 7\ntotal_active_file {100 * MB}\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (PROC, 8000000 * 1024),
        (PROC | V2, 2000 * MB),  # 3000 less what is used, of which 200 are file pages
        (PROC | V1, 1500 * MB),
        (PROC | {"proc/self/cgroup": "0::/\n"}, 8000000 * 1024),
    ],
    ids=["nothing", "machine", "version 2", "version 1", "root group"],
)
def test_least_of_what_is_left(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_memory(tmp_path) == expected
