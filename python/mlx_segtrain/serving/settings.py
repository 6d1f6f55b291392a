"""The settings of a server."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .. import hub
from ..errors import InputError
from ..files import cache_dir
from . import hosts

PORT = 8090
#: Host names and addresses that are reachable only from this machine.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """The settings of a server. Raises InputError for invalid settings, and for settings that would
    let anyone use the server."""

    model_dir: Path | None = None
    adapter: Path | None = None
    host: str = "127.0.0.1"
    port: int = PORT
    token: str | None = field(default=None, repr=False)
    roots: tuple[Path, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    downloads: bool = False  #: whether clients may download from the hub
    while_training: Literal["serve", "refuse"] = "serve"
    prompt_cache_gb: float = 1.0  #: maximum size of the cached prompts, in 10⁹ bytes
    ranks: int = 1  #: maximum number of processes of a training job on this machine
    hostfile: Path | None = None  #: a file with the hosts for the processes of a training job
    store: Path = field(default_factory=cache_dir)

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < 8:
            raise InputError("the token has fewer than 8 characters: choose a longer one.")
        if self.host not in LOOPBACK and self.token is None:
            raise InputError(
                f"other machines can reach this server at the address {self.host}: set a --token, "
                "or leave --host out."
            )
        if not 0 <= self.prompt_cache_gb < 1e6:
            raise InputError(
                "--prompt-cache-gb must be a number >= 0, in units of 10⁹ bytes; got "
                f"{self.prompt_cache_gb}."
            )
        if self.adapter is not None and self.model_dir is None:
            raise InputError("--adapter requires a MODEL: add one.")
        if self.ranks > 1 and self.hostfile is not None:
            raise InputError(
                "--ranks is the number of processes on this machine, and --hostfile names one host "
                "for each process: leave one of them out."
            )

    def hosts(self) -> hosts.Hosts:
        """Returns the hosts for the processes of a training job. Raises InputError."""
        return hosts.local(self.ranks) if self.hostfile is None else hosts.read(self.hostfile)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that clients may access: the given roots (by default the working directory
        and the Hugging Face cache), the server's store, and the served model and adapter."""
        given = [path for path in (self.model_dir, self.adapter) if path is not None]
        return (*(self.roots or (Path.cwd(), hub.cache())), self.store, *given)
