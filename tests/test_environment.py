"""Cores and a home directory as systems, containers and their users have them or have not."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from genzoo import environment
from genzoo.environment import cpu_quota, ensure_home, home, usable_cores


@pytest.fixture
def machine(monkeypatch) -> None:
    """Eight cores, no quota and nothing in the environment."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(environment, "cpu_quota", lambda: None)
    monkeypatch.setattr(environment, "_cores", lambda: 8)


@pytest.mark.parametrize(
    ("threads", "quota", "expected"),
    [
        *((None, None, 8), (None, 1.5, 2), (None, 0.25, 1), (None, 64.0, 8), ("3", None, 3), ("3", 1.0, 3)),
        *((" 2 ", None, 2), ("4,2", None, 4), ("", None, 8), ("0", None, 8), ("-1", None, 8), ("many", 2.0, 2)),
        *(("100000", None, 8), ("1.5", None, 8)),
    ],
)
def test_threads_are_those_that_openmp_or_the_container_allows(machine, monkeypatch, threads, quota, expected):
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    assert usable_cores() == expected


@pytest.mark.parametrize("present", ["process_cpu_count", "sched_getaffinity", "cpu_count", None])
def test_cores_are_counted_on_every_platform(monkeypatch, present):
    monkeypatch.setattr(os, "cpu_count", lambda: 3 if present == "cpu_count" else None)
    for name, function in {"process_cpu_count": lambda: 3, "sched_getaffinity": lambda pid: {0, 5, 7}}.items():
        monkeypatch.delattr(os, name, raising=False)
        if name == present:
            monkeypatch.setattr(os, name, function, raising=False)
    assert environment._cores() == (3 if present else 1)


QUOTAS = {
    "second version": ({"cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
    "no limit": ({"cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000"}, None),
    "the limit of a group above": (
        {"cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "50000 100000"},
        0.5,
    ),
    "the tightest of several": (
        {"cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/cpu.max": "200000 100000"},
        2.0,
    ),
    "first version": (
        {
            "cgroup": "4:memory:/x\n3:cpu,cpuacct:/a",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        },
        2.5,
    ),
    "first version, seen from inside a container": (
        {
            "cgroup": "3:cpu:/docker/0123",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000",
        },
        2.0,
    ),
    "first version without a limit": (
        {"cgroup": "3:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "1"},
        None,
    ),
    "nonsense": ({"cgroup": "0::/a\nnonsense", "sys/fs/cgroup/a/cpu.max": "much"}, None),
    "another system": ({}, None),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_the_quota_of_a_container_is_read(tmp_path, name):
    files, expected = QUOTAS[name]
    for path, text in files.items():
        file = tmp_path / ("proc/self/cgroup" if path == "cgroup" else path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert cpu_quota(tmp_path) == expected


def unknown_user(uid: int) -> None:
    raise KeyError(uid)


def test_a_user_without_a_home_gets_one_for_as_long_as_the_command_lasts(monkeypatch, tmp_path, capsys):
    removers: list = []
    monkeypatch.setattr(environment.atexit, "register", removers.append)
    monkeypatch.setattr(environment.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    monkeypatch.delenv("GENZOO_CACHE", raising=False)
    monkeypatch.setenv("HOME", "to be restored")
    monkeypatch.delenv("HOME")
    assert home() is None
    ensure_home()
    found = home()
    assert found is not None and found.parent == tmp_path and found.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err.startswith("genzoo: the user has no home directory: caches are kept in ")
    (remove,) = removers
    remove()
    assert not found.exists()


@pytest.mark.parametrize("said", ["relative", ""])
def test_a_home_that_cannot_be_one_is_none(monkeypatch, said):
    monkeypatch.setenv("HOME", said)
    assert home() in (None, Path("/"))


def test_a_home_that_is_there_is_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_home()
    assert os.environ["HOME"] == str(tmp_path) and capsys.readouterr().err == ""
