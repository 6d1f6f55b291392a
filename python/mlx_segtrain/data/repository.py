"""Finds and downloads the files of data sets on the Hugging Face hub.

A name has the form org/name[@revision][/configuration][:split]. If the repository's card lists the
files of each split, this list is used; otherwise, the file names determine the splits. Files are
downloaded unchanged and then read like local files. Interrupted downloads can be resumed, and
cached files can be read offline. Programs in a repository are never run. If no file has a supported
format, the hub's own Parquet copies are used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import re2  # pyright: ignore[reportMissingImports]
import yaml

from .. import events, hub
from ..errors import InputError, either, shown
from ..files import read_at_most

NAME = re.compile(
    rf"(?P<id>{hub.PART}/{hub.PART})(?:@(?P<revision>\w[\w.-]{{0,200}}))?"
    r"(?:/(?P<config>\w[\w.+-]{0,200}))?(?::(?P<split>\w[\w.-]{0,200}))?",
    re.ASCII,
)
CARD = "README.md"
#: The revision with the Parquet files that the hub has made from a repository, in one folder per
#: split.
CONVERTED = "refs/convert/parquet"
#: Prefixes of split names. Validation rows come from the first prefix for which a split exists.
TRAIN, VALID = ("train", "training"), ("validation", "valid", "val", "dev", "test", "eval")
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
WORDS = re.compile(rf"(?:^|[-._ /\d])({'|'.join((*TRAIN, *VALID))})(?=$|[-._ /\d])")
#: Files about the repository, which have no rows.
NO_ROWS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "config.json")

#: The YAML parser written in C, if it is available. It is faster, and cards may be long.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: The files of each split, in order.
Splits = dict[str, list[str]]


@dataclass(frozen=True)
class Named:
    """A data set on the hub. The configuration and the split are optional."""

    repository: hub.Repository
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        return f"{self.repository}{config}{f':{self.split}' if self.split else ''}"


def named(text: str | Path) -> Named | None:
    """Returns the data set that `text` names, or None if `text` is a path or is not a valid
    name."""
    found = NAME.fullmatch(str(text))
    if found is None or Path(text).exists():
        return None
    repository = hub.named(found["id"], "dataset")
    if repository is None:  # the text is the path of a folder
        return None
    own = replace(repository, revision=found["revision"])
    return Named(own, found["config"], found["split"])


def pinned(text: Any, folder: str | Path | None) -> Any:
    """Adds to the data set name `text` the commit of `folder`, which is a snapshot in the hub's
    cache. If `text` names another data set or already has a revision, returns it unchanged."""
    own = named(text) if isinstance(text, str | Path) else None
    before = hub.origin(folder or "")
    if own is None or before is None or own.repository != replace(before, revision=None):
        return text
    return str(replace(own, repository=before))


def fetch(
    name: Named,
    readable: Callable[[str], str | None],
    tell: events.OnEvent | None = None,
    *,
    ask: bool = True,
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Returns the files of the training rows and, if there are any, those of the validation rows,
    keyed by name.

    `readable` returns the format of a file from its name, or None. If `ask` is false, only the
    cache is used. Raises InputError if the data set, the configuration or the split does not exist.
    """
    tell = tell or (lambda event: None)
    configs: dict[str, Splits] = {}
    folder, standard = Path(), None
    for revision in (name.repository.revision, CONVERTED):
        at = replace(name.repository, revision=revision)
        try:
            folder = hub.fetch(at, lambda file: file == CARD, tell, ask=ask)
        except InputError:
            if revision != CONVERTED:
                raise
            break
        there = hub.files_of(folder)
        rows = [file for file in sorted(there) if _has_rows(file, readable)]
        if revision == CONVERTED:
            configs, standard = _by_folder(rows), None
        else:
            configs, standard = _configurations(_card(folder), rows, readable)
        if any(configs.values()):
            break
    if not any(configs.values()):
        raise InputError(
            f"{name.repository.id} has no files in a supported format, and the hub has no "
            "Parquet copy of it: use another data set, or convert it to JSON lines."
        )
    splits = configs[_chosen(name, configs, standard)]
    train = name.split or _training(name, splits)
    if train not in splits:
        raise InputError(f"{name.repository.id} has no split {train}; use {_list(splits)}.")
    valid = None if name.split else _validation(train, splits)
    wanted = {*splits[train], *(splits[valid] if valid else ())}
    exact = replace(name.repository, revision=folder.name)
    folder = hub.fetch(exact, wanted.__contains__, tell, ask=ask)
    said = f"{name}: training rows come from its split {train}"
    said += f", validation rows from {valid}" if valid else ""
    tell(events.stage("load", 0.01, said))
    train_files = {file: folder / file for file in splits[train]}
    return train_files, {file: folder / file for file in splits[valid]} if valid else {}


def _has_rows(file: str, readable: Callable[[str], str | None]) -> bool:
    parts = PurePosixPath(file).parts
    hidden = any(part.startswith((".", "_")) for part in parts)
    return not hidden and parts[-1] not in NO_ROWS and readable(parts[-1]) is not None


def _card(folder: Path) -> Any:
    """Returns the metadata at the head of the card, or {} if it is missing or cannot be parsed."""
    try:
        text = read_at_most(folder / CARD, 4 << 20)
        head = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
        return yaml.load(head[1], LOADER) if head else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def _configurations(
    card: Any, rows: list[str], readable: Callable[[str], str | None]
) -> tuple[dict[str, Splits], str | None]:
    """Returns the splits of each configuration, and the name of the default one, if any."""
    listed = card.get("configs") if isinstance(card, dict) else None
    configs: dict[str, Splits] = {}
    standard = None
    for own in listed if isinstance(listed, list) else []:
        if not isinstance(own, dict):
            continue
        title = str(own.get("config_name") or "default")
        below = str(own.get("data_dir") or "").strip("./")
        near = [file for file in rows if not below or file.startswith(f"{below}/")]
        if "data_files" in own:
            splits = _of_patterns(own["data_files"], near, below)
        else:
            splits = _by_words(near, readable)
        configs[title] = {split: files for split, files in splits.items() if files}
        standard = title if own.get("default") is True else standard
    if not configs:
        configs = {"default": _by_words(rows, readable)}
    return {title: own for title, own in configs.items() if own}, standard


def _of_patterns(given: Any, rows: list[str], below: str) -> Splits:
    """Returns the files that match the patterns in the card's `data_files`. The patterns may be
    listed without splits or by split."""
    pairs: list[tuple[str, Any]] = []
    if isinstance(given, dict):
        pairs = [(str(split), own) for split, own in given.items()]
    elif isinstance(given, list) and all(isinstance(own, dict) for own in given):
        pairs = [(str(own.get("split") or "train"), own.get("path")) for own in given]
    else:
        pairs = [("train", given)]
    splits: Splits = {}
    for split, own in pairs:
        patterns = own if isinstance(own, list) else [own]
        wanted = [_pattern(text, below) for text in patterns if isinstance(text, str)]
        found = [file for file in rows if any(one.fullmatch(file) for one in wanted)]
        splits.setdefault(split, []).extend(found)
    return splits


def _pattern(text: str, below: str) -> Any:
    """Compiles a shell pattern: * matches within a name, ** across folders, and ? and [] a single
    character."""
    text = "/".join(filter(None, [below, text[:1000].removeprefix("./")]))
    made = ""
    for part in re.findall(r"\*\*/?|\*|\?|\[[^]/]+\]|.", text, re.DOTALL):
        if part.startswith("**"):
            made += "(?:.*/)?" if part.endswith("/") else ".*"
        elif part in ("*", "?"):
            made += "[^/]*" if part == "*" else "[^/]"
        elif len(part) > 1:
            inner = part[1:-1].replace("\\", r"\\").replace("[", r"\[")
            made += f"[{'^' + inner[1:] if inner.startswith('!') else inner}]"
        else:
            made += re.escape(part)
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(made, options=options)
    except (re2.error, UnicodeError):
        return re2.compile(re2.escape(text), options=options)


def _by_words(rows: list[str], readable: Callable[[str], str | None]) -> Splits:
    """Selects the files of the most frequent format, and assigns them to splits by the words in
    their names and folders."""
    formats = Counter(readable(PurePosixPath(file).name) for file in rows)
    splits: Splits = {}
    for file in rows:
        if readable(PurePosixPath(file).name) != formats.most_common(1)[0][0]:
            continue
        stem = PurePosixPath(file).name.split(".")[0]
        shard, words = SHARD.fullmatch(stem), WORDS.findall(file.lower().rpartition(".")[0])
        split = shard[1] if shard else words[-1] if words else ""
        splits.setdefault(split, []).append(file)
    others = splits.pop("", [])
    return splits or ({"train": others} if others else {})


def _by_folder(rows: list[str]) -> dict[str, Splits]:
    """Groups the hub's own copies, whose paths are configuration/split/0000.parquet."""
    configs: dict[str, Splits] = {}
    for file in rows:
        config, *rest = file.split("/")
        if len(rest) == 2:
            split = rest[0].removeprefix("partial-")
            configs.setdefault(config, {}).setdefault(split, []).append(file)
    return configs


def _chosen(name: Named, configs: Mapping[str, Splits], standard: str | None) -> str:
    config = name.config or standard or ("default" if "default" in configs else None)
    if config is None and len(configs) == 1:
        config = next(iter(configs))
    if config is None:
        raise InputError(
            f"{name.repository.id} has several configurations: pick one of {_list(configs)}, as in "
            f"{name.repository}/{next(iter(configs))}."
        )
    if config not in configs:
        raise InputError(
            f"{name.repository.id} has no configuration {shown(config)}; use {_list(configs)}."
        )
    return config


def _list(words: Iterable[str]) -> str:
    words = list(words)
    return either([*words[:12], *(["others"] if len(words) > 12 else [])])


def _training(name: Named, splits: Splits) -> str:
    """Returns the split called train or training. If there is none, returns the first split with
    one of these words as a prefix, or the only split."""
    found = [own for own in splits if own in TRAIN] or [own for own in splits if _is(own, TRAIN)]
    if found:
        return found[0]
    if len(splits) == 1:
        return next(iter(splits))
    raise InputError(
        f"{name.repository.id} has no split called train: pick one of {_list(splits)}, as in "
        f"{name.repository}:{next(iter(splits))}."
    )


def _is(split: str, words: Iterable[str]) -> bool:
    return re.match(rf"(?:{'|'.join(words)})(?![a-z])", split.lower()) is not None


def _validation(train: str, splits: Splits) -> str | None:
    """Returns the validation split that belongs to a training split, for example test_sft for
    train_sft."""
    rest = re.sub(rf"^(?:{'|'.join(reversed(TRAIN))})", "", train)
    return next((f"{word}{rest}" for word in VALID if f"{word}{rest}" in splits), None)
