"""Checks the environment: versions, devices, disks, memory and network, without heavy imports."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lightning_hub.doctor.findings import Finding
from lightning_hub.launch.devices import visible_gpus
from lightning_hub.runs.folder import default_cache_dir

PACKAGE = "lightning-hub"
MALICIOUS = {"2.6.2", "2.6.3"}
"""Releases of lightning that stole credentials."""

GB = 1e9
LEAST_DISK, LEAST_MEMORY, LEAST_SHARED = 5 * GB, 2 * GB, 0.25 * GB
"""Minimum bytes; with less, a run of a small model is likely to fail."""

LEAST_FILES = 1024
"""Number of open files that a run with data workers and shards can need."""


def check_machine(runs: Path) -> list[Finding]:
    """Return the findings about this machine.

    Args:
        runs: The folder of the runs.
    """
    return [
        *_packages(),
        _torch_and_gpus(),
        _disk("disk of the runs root", runs, "free space, or use another disk with --runs-root"),
        _disk("disk of the cache", default_cache_dir(), "free space, or set LIGHTNING_HUB_CACHE to another disk"),
        _writable(runs),
        _shared_memory(),
        _memory(),
        _cores(),
        _loopback(),
        _open_files(),
    ]


# ---- versions ------------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    """Yield a finding for Python and one for each package that this project needs."""
    try:
        requirements = metadata.requires(PACKAGE) or []
        python = SpecifierSet(metadata.metadata(PACKAGE)["Requires-Python"])
    except metadata.PackageNotFoundError:
        yield Finding("packages", False, f"{PACKAGE} is not installed", "install it: pip install -e .")
        return
    yield _in_range("python", ".".join(map(str, sys.version_info[:3])), python)
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: Requirement) -> Finding:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, False, "not installed", f"pip install '{requirement}'")
    if requirement.name == "lightning" and version in MALICIOUS:
        remedy = "remove it, install another version, and change every password and token that this machine could read"
        return Finding("lightning", False, f"{version} was a malicious release", remedy)
    return _in_range(requirement.name, version, requirement.specifier)


def _in_range(name: str, version: str, supported: SpecifierSet) -> Finding:
    ok = supported.contains(version, prereleases=True)
    remedy = None if ok else f"install a supported version: {name}{supported}"
    return Finding(name, ok, f"{version} (supported: {supported})", remedy)


# ---- devices -------------------------------------------------------------------------------------------------------


def _torch_and_gpus() -> Finding:
    """Compare the build of torch with the GPUs of this machine."""
    gpus, build = visible_gpus(os.environ), _torch_build()
    there = f"{gpus} x {_gpu_name()}" if gpus else "no NVIDIA GPU is visible"
    built = f"for CUDA {build}" if build else "without CUDA"
    remedy = "install a torch built for CUDA (https://pytorch.org/get-started/locally)"
    ok = not gpus or build is not None
    return Finding("torch and GPUs", ok, f"{there}, torch is built {built}", None if ok else remedy)


def _torch_build() -> str | None:
    """Return the CUDA version of the torch build, from its version file, because an import of torch takes seconds."""
    try:
        file = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
        found = re.search(r"^cuda: .*= '([\d.]+)'", file.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, metadata.PackageNotFoundError):
        return None
    return found[1] if found else None


def _gpu_name(driver: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """Return the driver's name of the first GPU."""
    try:
        text = (min(driver.iterdir()) / "information").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "NVIDIA GPU"
    found = re.search(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE)
    return found[1] if found else "NVIDIA GPU"


# ---- disk and memory -----------------------------------------------------------------------------------------------


def _disk(check: str, path: Path, remedy: str) -> Finding:
    place = _existing(path)
    free = shutil.disk_usage(place).free
    return _enough(check, free, LEAST_DISK, f"free at {place}", remedy)


def _enough(check: str, found: float, least: float, what: str, remedy: str) -> Finding:
    ok = found >= least
    wanted = "" if ok else f", at least {least / GB:.1f} GB are needed"
    return Finding(check, ok, f"{found / GB:.1f} GB {what}{wanted}", None if ok else remedy)


def _existing(path: Path) -> Path:
    """Return the nearest folder above that exists; a check does not create folders."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _writable(runs: Path) -> Finding:
    place = _existing(runs)
    ok = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    detail = f"{runs} {'can' if ok else 'cannot'} be written" + ("" if place == runs.absolute() else f" (in {place})")
    return Finding("runs root", ok, detail, None if ok else "set another with --runs-root or LIGHTNING_HUB_RUNS")


def _shared_memory(place: Path = Path("/dev/shm")) -> Finding:
    check = "shared memory"
    if not place.is_dir():
        return Finding(check, True, f"this system has no {place}")
    remedy = "start the container with more: docker run --shm-size=8g"
    return _enough(check, shutil.disk_usage(place).total, LEAST_SHARED, f"at {place}", remedy)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    what = f"available of {memory.total / GB:.1f}"
    return _enough("memory", memory.available, LEAST_MEMORY, what, "end other programs, or use a larger machine")


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", True, f"{usable} usable of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}")


# ---- communication between processes -------------------------------------------------------------------------------


def _loopback() -> Finding:
    """Connect to a port of this machine, as ranks do."""
    check = "loopback network"
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError as error:
        remedy = "allow connections to 127.0.0.1: the ranks of a run use this address"
        return Finding(check, False, f"127.0.0.1 cannot be used ({error})", remedy)
    return Finding(check, True, "127.0.0.1 can be bound and reached")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = soft == resource.RLIM_INFINITY or soft >= LEAST_FILES
    shown = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} (hard limit {hard})"
    return Finding("open files", ok, shown, None if ok else f"raise the limit: ulimit -n {LEAST_FILES * 64}")
