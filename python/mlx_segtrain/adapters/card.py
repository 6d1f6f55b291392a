"""The model card of an adapter: README.md in its folder."""

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import FACETS, TrainConfig
from ..data.prompting import Prompting
from ..files import write_text
from ..hub import name_of
from ..lora import Adapter
from ..lora.folder import README


@dataclass(frozen=True)
class About:
    """The metadata of an adapter.

    `model` is the base model, and `run` is the configuration of the run that trained the adapter.
    `facts` maps the names of further facts to their values; each fact becomes a line of the model
    card.
    """

    model: str
    dropout: float = 0.0
    run: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        step: int | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> "About":
        """Returns the metadata of an adapter trained by a run with this configuration."""
        run = config.model_dump(mode="json")
        return cls(name_of(config.model_dir), config.lora_dropout, run, step, dict(facts or {}))


def write_card(folder: Path, adapter: Adapter, about: About, form: str = "ours") -> None:
    """Writes README.md, unless the folder contains one that this package did not write. `form`
    names the adapter's format: ours, mlx-lm, peft or gguf."""
    if is_ours(folder / README):
        write_text(folder / README, card(adapter, about, form))


def card(adapter: Adapter, about: About, form: str) -> str:
    """Returns the text of the model card, which begins with the metadata that model hubs read."""
    model, run = about.model, about.run
    kind = adapter.kind.name
    ranks = Counter(adapter.ranks.values())
    spread = ", ".join(f"{rank} ({n} layers)" for rank, n in sorted(ranks.items()))
    scales = ", ".join(f"{x:g}" for x in sorted(set(adapter.scales.values()))[:4])
    numbers = sum(a.size + b.size for a, b in adapter.tensors.values())
    rows = {
        "base": model,
        "kind": kind,
        "rank": spread,
        "multiplier": scales,
        "parameters": f"{numbers:,}",
        **({"step": str(about.step)} if about.step is not None else {}),
        **about.facts,
        **{name: str(run[name]) for name, own in FACETS.items() if own.on_card and name in run},
    }
    table = "\n".join(f"| {name.replace('_', ' ')} | {_cell(x)} |" for name, x in rows.items())
    return f"""---
base_model: {model}
library_name: mlx
tags: [mlx, {kind.lower()}, adapter]
---

# {kind} adapter of {model.rstrip("/").rsplit("/", 1)[-1]}

| | |
|---|---|
{table}

## Use

{_use(form, model or "MODEL", Prompting.of(run))}

{MARK}
"""


#: Marks the cards that this package wrote. Only these cards may be overwritten; other README.md
#: files are kept.
MARK = "<!-- written by mlx-segtrain -->"


def is_ours(file: Path) -> bool:
    """Returns whether README.md is missing, or is a card that this package wrote."""
    try:
        return MARK in file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _use(form: str, model: str, prompting: Prompting) -> str:
    name, model = model, shlex.quote(model)
    flags = "".join(f" {shlex.quote(flag)}" for flag in prompting.flags)
    mlx = f'python -m mlx_lm generate --model {model} --adapter-path .{flags} --prompt "…"'
    peft = f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("…")  # the model that {name} was made from
model = PeftModel.from_pretrained(base, "{"." if form == "peft" else "peft"}")
```"""
    if form == "gguf":
        return "    llama-cli -m base.gguf --lora adapter.gguf"
    if form == "peft":
        return peft
    if form == "mlx-lm":
        return f"    {mlx}"
    return f"""    mlx-segtrain generate --model {model} --adapter-path . --prompt "…"
    {mlx}

With Hugging Face PEFT, after `mlx-segtrain export . --to peft --out peft`:

{peft}

`mlx-segtrain merge . --into {model} --out merged` merges it into the base model."""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
