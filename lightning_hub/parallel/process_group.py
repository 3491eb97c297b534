"""Starts and ends the process group of a run; missing ranks are an error within minutes."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # exported at run time

from lightning_hub.errors import HubError, first_line
from lightning_hub.launch.environment import ProcessInfo

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
"""How long ranks wait for each other at the start."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a collective may take; other ranks wait in one while one rank writes a large checkpoint."""


class RendezvousError(HubError):
    """Some ranks of the run have not started, or cannot be reached."""

    kind = "comm"


class HubClusterEnvironment(ClusterEnvironment):
    """Gives Lightning the rank and world size of this process, so that it does not start processes itself."""

    def __init__(self, process: ProcessInfo, address: str, port: int) -> None:
        self.process = process
        self._address, self._port = address, port

    @property
    def creates_processes_externally(self) -> bool:
        """Return that all processes are already started."""
        return True

    @property
    def main_address(self) -> str:
        """The host name or address of rank 0."""
        return self._address

    @property
    def main_port(self) -> int:
        """The port of rank 0."""
        return self._port

    @staticmethod
    def detect() -> bool:
        """Return False: Lightning must not choose this class from environment variables."""
        return False

    def world_size(self) -> int:
        """Return the world size."""
        return self.process.world_size

    def set_world_size(self, size: int) -> None:
        """Check that Lightning has the same number."""
        assert size == self.process.world_size, f"Lightning counts {size} processes"

    def global_rank(self) -> int:
        """Return the rank of this process."""
        return self.process.rank

    def set_global_rank(self, rank: int) -> None:
        """Check that Lightning has the same number."""
        assert rank == self.process.rank, f"Lightning counts this process as rank {rank}"

    def local_rank(self) -> int:
        """Return the local rank."""
        return self.process.local_rank

    def node_rank(self) -> int:
        """Return the number of the node."""
        return self.process.node_rank


def init_process_group(process: ProcessInfo, *, on_gpu: bool) -> HubClusterEnvironment:
    """Initialise the process group with the other ranks, and return the environment for Lightning.

    Hosts use gloo and GPUs use NCCL, so that collectives on the host do not wait for a device.

    Raises:
        RendezvousError: Not all ranks have started within ``RENDEZVOUS_TIMEOUT``.
    """
    environment = _environment(process)
    if on_gpu:
        torch.cuda.set_device(process.local_rank)
    address = f"{environment.main_address}:{environment.main_port}"
    try:
        store = _rendezvous_store(environment)
        await_all(PrefixStore("lightning-hub/arrival", store), process)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=PrefixStore("lightning-hub/group", store),
            rank=process.rank,
            world_size=process.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=torch.device("cuda", process.local_rank) if on_gpu else None,
        )
    except torch.distributed.DistError as error:
        reason = first_line(error)
        raise RendezvousError(
            f"{process} cannot connect to the other ranks at {address}: {reason}",
            where=f"rank {process.rank}",
            remedy="start all ranks with the same address and port; they must belong to the node of rank 0",
        ) from error
    return environment


def _rendezvous_store(environment: HubClusterEnvironment) -> Store:
    """Return the store through which ranks find each other: that of torchrun's agent or of rank 0."""
    process = environment.process
    is_server = process.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return TCPStore(
        environment.main_address,
        environment.main_port,
        process.world_size,
        is_master=is_server,
        timeout=RENDEZVOUS_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=process.listener if is_server else None,
    )


def await_all(store: Store, process: ProcessInfo) -> None:
    """Wait until every rank has signed in.

    Raises:
        RendezvousError: Naming those that have not.
    """
    store.set(str(process.rank), "here")
    try:
        store.wait([str(rank) for rank in range(process.world_size)], RENDEZVOUS_TIMEOUT)
    except torch.distributed.DistStoreError as error:
        missing = [rank for rank in range(process.world_size) if not store.check([str(rank)])]
        raise RendezvousError(
            f"ranks {', '.join(map(str, missing))} of {process.world_size} did not start within {RENDEZVOUS_TIMEOUT}",
            where=f"rank {process.rank}",
            remedy="look at their logs, or start them",
        ) from error


def destroy_process_group() -> None:
    """Destroy the process group, if there is one; otherwise it can abort the process at its exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _environment(process: ProcessInfo) -> HubClusterEnvironment:
    if process.launcher == "slurm" and "MASTER_ADDR" not in os.environ:
        slurm = SLURMEnvironment(auto_requeue=False)
        return HubClusterEnvironment(process, slurm.main_address, slurm.main_port)
    return HubClusterEnvironment(process, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
