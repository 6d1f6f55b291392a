"""Uploads adapters and models to the hub. Only files with known names are sent.

Each file is opened once, in a folder that is already open and without following links. Therefore
the content that was checked is the content that is sent.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from ... import events
from ...adapters.gguf import NAME as GGUF
from ...errors import InputError
from ...files import read_json
from ...hub import endpoint
from ...lora.folder import CONFIG, OPTIQ_CONFIG, PEFT_WEIGHTS, README, UNPADDED, WEIGHTS
from ...safetensors import read_header

#: Other files that are sent with an adapter or a model.
ABOUT = (README, "LICENSE", "LICENSE.txt", "LICENSE.md", "metrics.json", "loss.png", "loss.svg")
#: Files of an adapter from a run, an import or an export. A GGUF file is complete without the
#: others.
OF_ADAPTER = (WEIGHTS, UNPADDED, PEFT_WEIGHTS, CONFIG, OPTIQ_CONFIG, GGUF)
#: Files of a model in mlx-lm's format, in addition to its weights (MODEL_WEIGHTS).
MODEL_CONFIG = "config.json"
OF_MODEL = (
    *(MODEL_CONFIG, "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
    *("merges.txt", "tiktoken.model", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
)
MODEL_WEIGHTS = re.compile(r"model(-\d{1,6}-of-\d{1,6})?\.safetensors")
#: Maximum bytes of a model's text file, and of an adapter's text file (the limit of
#: files.read_json).
MOST, MOST_OF_ADAPTER = 64 << 20, 4 << 20

#: Advice for each status code with which the hub refuses an upload.
REFUSALS = {
    401: "the token is not valid: log in again with `hf auth login`, or set another HF_TOKEN",
    403: "the token may not write there: use one with write access, or another repository",
    404: "the user or organization does not exist, or the token has no access to it",
    429: "it has received too many requests; wait a while",
}


def check(folder: Path) -> list[str]:
    """Returns the names of the files to send. Raises InputError if the folder contains neither an
    adapter nor a model."""
    with _opened_folder(folder, "pushed") as place:
        return _names(folder, os.listdir(place))


@dataclass(frozen=True)
class Pushed:
    url: str
    commit: str


def push(folder: Path, repo: str, *, private: bool, tell: events.OnEvent) -> Pushed:
    """Uploads the files of an adapter or a model to a repository, which is created if it does not
    exist. The token comes from the environment or from `hf auth login`.

    Raises InputError if the folder contains neither an adapter nor a model, or if the hub refuses
    the upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi(endpoint=endpoint())
    tell(events.stage("load", 0.05, f"{folder} to {endpoint()}/{repo}"))
    with opened(folder) as files:
        tell(events.stage("load", 0.1, f"sending {', '.join(files)}"))
        try:
            made = hub.create_repo(repo, private=private, exist_ok=True)
            commit = hub.create_commit(
                repo_id=repo,
                operations=[CommitOperationAdd(name, file) for name, file in files.items()],
                commit_message="Upload with mlx_segtrain",
            )
        except HFValidationError:
            raise InputError(f"{repo} is not a valid hub name: use the form org/name.") from None
        except ValueError as error:  # huggingface_hub asks the hub to check the card first
            why = " ".join(str(error).split())[:200]
            raise InputError(
                f"the hub refuses README.md of {folder} ({why}): set base_model in it to the "
                "name of the model on the hub, such as org/name, and push again."
            ) from None
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            why = REFUSALS.get(status or 0, "try again later")
            raise InputError(
                f"the push to {repo} failed with status {status} from the hub: {why}."
            ) from None
    return Pushed(str(made), str(commit.oid))


@contextmanager
def opened(
    folder: Path, done: str = "pushed", *, models: bool = True
) -> Iterator[dict[str, BufferedReader]]:
    """Opens and checks the files to send, and yields them by name. `done` is the verb in error
    messages, such as "pushed".

    Raises InputError if a file's content does not match its name, or if the folder contains a model
    although `models` is false.
    """
    with ExitStack() as stack:
        place = stack.enter_context(_opened_folder(folder, done))
        files = {}
        for name in _names(folder, os.listdir(place), models):
            files[name] = stack.enter_context(_opened_file(folder / name, place, done))
            check_content(folder / name, files[name], done)
        yield files


def _names(folder: Path, there: Sequence[str], models: bool = True) -> list[str]:
    weights = [name for name in there if MODEL_WEIGHTS.fullmatch(name)]
    adapter = CONFIG in there and (WEIGHTS in there or PEFT_WEIGHTS in there)
    if adapter or GGUF in there:
        wanted = (*OF_ADAPTER, *ABOUT)
    elif not models:
        raise InputError(f"{folder} contains no adapter: specify the folder of an adapter.")
    elif MODEL_CONFIG in there and weights:
        wanted = (*OF_MODEL, *weights, *ABOUT)
    else:
        raise InputError(
            f"{folder} contains neither an adapter nor a model: only the files of adapters and "
            "models can be pushed."
        )
    return sorted(set(wanted) & set(there))


@contextmanager
def _opened_folder(folder: Path, done: str) -> Iterator[int]:
    """Opens a folder and yields its descriptor. Raises InputError if its path contains a link."""
    how = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    place = os.open("/", how)
    try:
        for part in folder.parts[1:]:
            above, place = place, os.open(part, how, dir_fd=place)
            os.close(above)
        yield place
    except OSError as error:
        raise _refused(folder, error, done) from None
    finally:
        os.close(place)


@contextmanager
def _opened_file(path: Path, place: int, done: str) -> Iterator[BufferedReader]:
    """Opens a regular file. Raises InputError for a link, because a link may point to a secret
    file."""
    try:
        how = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        number = os.open(path.name, how, dir_fd=place)
    except OSError as error:
        raise _refused(path, error, done) from None
    with os.fdopen(number, "rb") as file:
        own = os.fstat(number)
        if not stat.S_ISREG(own.st_mode) or own.st_nlink != 1:
            raise InputError(f"{path} is a link or not a regular file: nothing was {done}.")
        if not path.name.endswith((".safetensors", ".gguf")) and own.st_size > MOST:
            raise InputError(f"{path} is larger than {MOST >> 20} MiB: nothing was {done}.")
        yield file


def check_content(path: Path, file: BufferedReader, done: str) -> None:
    """Raises InputError if the content does not match the file's name."""
    if path.suffix == ".safetensors":
        with _named(path, file) as opened:
            read_header(opened)
    elif path.suffix == ".gguf" and file.read(4) != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: nothing was {done}.")
    elif path.suffix == ".json":
        with _named(path, file) as opened:
            read_json(opened, MOST if path.name in OF_MODEL else MOST_OF_ADAPTER)
    file.seek(0)


@contextmanager
def _named(path: Path, file: BufferedReader) -> Iterator[Path]:
    """Yields a path through which an open file can be read. In errors raised inside the context,
    this path is replaced with `path`."""
    opened = Path(f"/dev/fd/{file.fileno()}")
    try:
        yield opened
    except InputError as error:
        raise InputError(str(error).replace(str(opened), str(path))) from None


def _refused(path: Path, error: OSError, done: str) -> InputError:
    return InputError(f"{path} cannot be {done}: it was removed, or is a link ({error.strerror}).")
