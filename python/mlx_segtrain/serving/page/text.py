"""Numbers, times and events in words, with their units."""

import json
from datetime import datetime, timezone

from ...events import Event
from ..jobs.row import Row

#: A space that does not break a number from its unit.
SPACE = "\u00a0"


def size(n: float) -> str:
    """Bytes."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= least:
            return f"{n / least:.{1 if n < 100 * least else 0}f}{SPACE}{unit}"
    return f"{n:.0f}{SPACE}B"


def many(n: float) -> str:
    """A count in short, as of parameters."""
    for unit, least in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= least:
            return f"{n / least:.{1 if n < 100 * least else 0}f}{SPACE}{unit}"
    return f"{n:.0f}"


def titled(name: str) -> str:
    """A name of a metric, as a title."""
    return name.replace("_", " ").capitalize()


def counted(n: int, one: str) -> str:
    """A number of things: "1 row", "4,122 rows"."""
    return f"{n:,} {one}{'' if n == 1 else 's'}"


def gb(value: float | None) -> str:
    """10⁹ bytes, given as such."""
    return "–" if value is None else size(1e9 * value)


def fixed(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def rate(value: float | None) -> str:
    """A learning rate."""
    return "–" if value is None else f"{value:.3g}"


def duration(seconds: float) -> str:
    total = round(seconds)
    if total < 60:
        parts = f"{total} s"
    elif total < 3600:
        parts = f"{total // 60} min {total % 60:02d} s"
    else:
        parts = f"{total // 3600} h {total // 60 % 60:02d} min"
    return parts.replace(" ", SPACE)


def percent(share: float, digits: int = 0) -> str:
    return f"{share:.{digits}%}".replace("%", f"{SPACE}%")


def time_of(text: str) -> datetime:
    """Of a row's time, which is UTC."""
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc)


def ago(text: str) -> str:
    seconds = (datetime.now(timezone.utc) - time_of(text)).total_seconds()
    if seconds < 60:
        return "just now"
    for unit, length in (("day", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            n = int(seconds // length)
            return f"{n} {unit}{'s' if unit == 'day' and n > 1 else ''} ago"
    return "just now"


def took(row: Row) -> str:
    """How long a job has run, the last time it did."""
    if row.started_at is None:
        return "–"
    end = time_of(row.ended_at) if row.ended_at else datetime.now(timezone.utc)
    return duration(max(0.0, (end - time_of(row.started_at)).total_seconds()))


def tail(path: str | None, parts: int = 1) -> str:
    """The end of a path, which tells it from others."""
    return "/".join((path or "").rstrip("/").split("/")[-parts:])


def line_of(event: Event) -> str:
    """An event as a line of the log."""
    kind = event["type"]
    clock = f"{event['ts'][11:19]} " if isinstance(event.get("ts"), str) else ""
    match kind:
        case "log":
            return str(event.get("line"))
        case "queued":
            return f"{clock}queued{' again' if event.get('resumed') else ''}"
        case "started":
            return f"{clock}started as process {event.get('pid')}"
        case "stage":
            return f"{event.get('stage')}: {event.get('message')}"
        case "warning":
            return f"warning: {event.get('message')}"
        case "sample":
            return f"step {event.get('step')}, answer to {event.get('prompt')!r}: {event['text']}"
        case "metric":
            return _metric(event)
        case "failed":
            return f"{clock}failed: {event.get('error')}"
        case "cancelled":
            return f"{clock}cancelled: {event.get('message') or ''}".rstrip(": ")
        case "done":
            where = event.get("output_dir")
            return f"{clock}done{f': {where}' if where else ''}"
    return json.dumps(event, ensure_ascii=False)


def _metric(event: Event) -> str:
    step, loss = event.get("step"), event.get("loss")
    if event.get("kind") == "val":
        more = f", {event['tokens']:,} tokens" if isinstance(event.get("tokens"), int) else ""
        return f"step {step} validation loss {fixed(loss)}{more}"
    if event.get("kind") == "train":
        return (
            f"{event.get('message')}, rate {rate(event.get('learning_rate'))}, gradient norm "
            f"{fixed(event.get('grad_norm'), 3)}, peak {fixed(event.get('peak_gb'), 2)} GB"
        )
    return f"step {step} scores {event.get('scores') or event.get('error')}"
