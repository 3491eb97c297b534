"""The processes of a run find each other, or say within minutes that they did not."""

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
"""How long an exchange of a running job may take; writing a large checkpoint on one rank is among them."""


class RendezvousError(HubError):
    """Some processes of the run have not come."""

    kind = "comm"


class HubClusterEnvironment(ClusterEnvironment):
    """Tells Lightning where this process stands, so that it does not guess and starts no process of its own."""

    def __init__(self, process: ProcessInfo, address: str, port: int) -> None:
        self.process = process
        self._address, self._port = address, port

    @property
    def creates_processes_externally(self) -> bool:
        """Say that all processes run already."""
        return True

    @property
    def main_address(self) -> str:
        """Where rank 0 listens."""
        return self._address

    @property
    def main_port(self) -> int:
        """On which port."""
        return self._port

    @staticmethod
    def detect() -> bool:
        """Never be chosen by looking at variables."""
        return False

    def world_size(self) -> int:
        """Return how many processes there are."""
        return self.process.world_size

    def set_world_size(self, size: int) -> None:
        """Hold Lightning's number against ours."""
        assert size == self.process.world_size, f"Lightning counts {size} processes"

    def global_rank(self) -> int:
        """Return the number of this process."""
        return self.process.rank

    def set_global_rank(self, rank: int) -> None:
        """Hold Lightning's number against ours."""
        assert rank == self.process.rank, f"Lightning counts this process as rank {rank}"

    def local_rank(self) -> int:
        """Return its number on its node."""
        return self.process.local_rank

    def node_rank(self) -> int:
        """Return the number of its node."""
        return self.process.node_rank


def init_process_group(process: ProcessInfo, *, on_gpu: bool) -> HubClusterEnvironment:
    """Meet the other processes of the run and return the place as Lightning wants it.

    Hosts talk through gloo and GPUs through NCCL, so that agreeing on something waits for no device.

    Raises:
        RendezvousError: They have not all come within ``RENDEZVOUS_TIMEOUT``.
    """
    environment = _environment(process)
    if on_gpu:
        torch.cuda.set_device(process.local_rank)
    address = f"{environment.main_address}:{environment.main_port}"
    try:
        store = _meeting_point(environment)
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
            f"{process} cannot meet the others at {address}: {reason}",
            where=f"rank {process.rank}",
            remedy="start all ranks with the same address and port, which rank 0's machine must own",
        ) from error
    return environment


def _meeting_point(environment: HubClusterEnvironment) -> Store:
    """Return the store through which ranks find each other: torchrun's agent may have it, else rank 0 does."""
    process = environment.process
    serves = process.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return TCPStore(
        environment.main_address,
        environment.main_port,
        process.world_size,
        is_master=serves,
        timeout=RENDEZVOUS_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=process.listener if serves else None,
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
            f"ranks {', '.join(map(str, missing))} of {process.world_size} have not come within {RENDEZVOUS_TIMEOUT}",
            where=f"rank {process.rank}",
            remedy="see their logs, or start them",
        ) from error


def destroy_process_group() -> None:
    """Take leave of the other processes, if there are any: a group that is left behind can abort at the exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _environment(process: ProcessInfo) -> HubClusterEnvironment:
    if process.launcher == "slurm" and "MASTER_ADDR" not in os.environ:
        slurm = SLURMEnvironment(auto_requeue=False)
        return HubClusterEnvironment(process, slurm.main_address, slurm.main_port)
    return HubClusterEnvironment(process, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
