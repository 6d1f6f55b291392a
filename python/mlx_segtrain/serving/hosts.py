"""The hosts on which the processes of a training job may run. mlx.launch starts the processes."""

from __future__ import annotations

import json
import os
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
from pydantic import BaseModel, Field, ValidationError

from ..errors import InputError, either
from ..planning.budget import budget_bytes

#: For a host with this name, mlx.launch starts processes on this machine, without SSH.
HERE = "127.0.0.1"
#: MLX's backends. The first two need no special hardware to connect ranks.
BACKENDS = ("ring", "nccl", "jaccl", "jaccl-ring")


class Host(BaseModel):
    """A host in mlx.launch's hostfile: its SSH name, the addresses at which other ranks reach it,
    and, for JACCL, the devices that connect it to each rank."""

    ssh: str = Field(min_length=1, pattern="^[^-]")  # ssh would read a name such as -x as an option
    ips: list[str] = []
    rdma: list[str | list[str] | None] = []


class Hosts(BaseModel):
    """The content of mlx.launch's hostfile, which has one entry per rank."""

    hosts: list[Host]
    backend: str = ""  #: if empty, nccl is used with CUDA, otherwise ring
    envs: list[str] = []

    def first(self, count: int) -> Hosts:
        """Returns the hosts of the first `count` ranks. Raises InputError if the server has fewer
        ranks."""
        most = len(self.hosts)
        if most == 1 < count:
            raise InputError(
                "this server trains with one process: leave ranks out, or start the server with "
                "--ranks or --hostfile.",
                status=403,
                field="ranks",
            )
        if count > most:
            raise InputError(
                f"ranks = {count}, but this server allows at most {most} per job: choose fewer.",
                status=422,
                field="ranks",
            )
        hosts = [own.model_copy(update={"rdma": own.rdma[:count]}) for own in self.hosts[:count]]
        return self.model_copy(update={"hosts": hosts})

    @property
    def repeats(self) -> int:
        """The number of ranks per host, for mlx.launch. It is the number of consecutive entries,
        from the start of the file, that name the first host."""
        return len(list(takewhile(lambda own: own.ssh == self.hosts[0].ssh, self.hosts)))

    @property
    def ranks_here(self) -> list[int]:
        """For each rank, the number of ranks on its host."""
        names = [own.ssh for own in self.hosts]
        return [names.count(name) for name in names]

    @property
    def ports(self) -> int:
        """The number of ports that mlx.launch uses, starting at its --starting-port."""
        return max(1, sum(len(own.ips) for own in self.hosts))


def local(count: int) -> Hosts:
    """Returns the hosts for `count` ranks on this machine. Raises InputError if the ranks could not
    use the GPUs in CUDA_VISIBLE_DEVICES."""
    if count > 1 and "CUDA_VISIBLE_DEVICES" in os.environ and mx.cuda.is_available():
        raise InputError(
            "CUDA_VISIBLE_DEVICES is set, but mlx.launch always gives the machine's first GPUs to "
            "the processes of a job: unset the variable, or start the server without --ranks."
        )
    return Hosts(hosts=[Host(ssh=HERE, ips=[HERE])] * count)


def read(file: Path) -> Hosts:
    """Reads a hostfile in mlx.launch's format. Raises InputError if the file cannot be used."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        own = Hosts.model_validate({"hosts": found} if isinstance(found, list) else found)
    except OSError as error:
        raise InputError(
            f"--hostfile {file} cannot be read ({error.strerror}): choose another file."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f"--hostfile {file} is not a valid mlx.launch hostfile ({where}: {first['msg']})."
        ) from None
    except ValueError as error:
        raise InputError(
            f"--hostfile {file} is not valid JSON ({error}): correct the file."
        ) from None
    return _checked(own, file)


def _checked(own: Hosts, file: Path) -> Hosts:
    if len(own.hosts) < 2:
        raise InputError(
            f"--hostfile {file} has fewer than 2 hosts: add hosts, or leave --hostfile out to "
            "train with one process."
        )
    if own.backend and own.backend not in BACKENDS:
        raise InputError(
            f"--hostfile {file} has the unknown backend {own.backend!r}: choose {either(BACKENDS)}."
        )
    if own.hosts[0].ssh != HERE:
        raise InputError(
            f'--hostfile {file} begins with the host "{own.hosts[0].ssh}", but the first host must '
            f'be this machine ("ssh": "{HERE}"), where rank 0 writes the files of each job.'
        )
    nccl = own.backend == "nccl" or (not own.backend and mx.cuda.is_available())
    names = [host.ssh for host in own.hosts]
    if nccl and names != [name for name in dict.fromkeys(names) for _ in range(own.repeats)]:
        raise InputError(
            f"--hostfile {file} lists some hosts more often than others, or not consecutively: "
            "list every host the same number of times, in consecutive entries, because mlx.launch "
            "assigns GPUs by counting the processes of a host."
        )
    if any(not host.ips for host in own.hosts):
        raise InputError(
            f"--hostfile {file} has a host without ips: add the address at which the other hosts "
            "reach it."
        )
    return own


def share_memory(values: dict[str, Any], ranks: int) -> None:
    """If several ranks share the memory of this host, limits the run's memory budget to this rank's
    share. This is not needed with CUDA, where each rank has its own GPU."""
    unset = values.get("memory_budget_gb") in (None, "auto")  # a client may also send null
    if unset and ranks > 1 and not mx.cuda.is_available():
        values["memory_budget_gb"] = budget_bytes() / 1e9 / ranks
