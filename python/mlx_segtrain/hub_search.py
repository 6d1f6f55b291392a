"""Searches the Hugging Face hub for models and data sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import InputError, reason
from .hub import PATIENCE_S, Kind, endpoint, offline

#: The tags that a model must have. They mean that MLX can read the weights and that the model
#: generates text.
OF_MODELS = ("safetensors", "text-generation")


@dataclass(frozen=True)
class Hit:
    """A repository in the results of a hub search."""

    name: str
    downloads: int


def search(words: str, kind: Kind = "model", limit: int = 8) -> list[Hit]:
    """Returns up to `limit` repositories whose names contain these words, the most downloaded
    first. Raises InputError if the hub cannot be searched."""
    if offline():
        raise InputError(f"{offline()} is set, which forbids requests to the hub: unset it.")
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    # HfApi.list_models would send the same request, but without a timeout.
    how: dict[str, Any] = {"search": words, "sort": "downloads", "limit": limit}
    if kind == "model":
        how["filter"] = list(OF_MODELS)
    url = f"{endpoint()}/api/{kind}s"
    try:
        answer = get_session().get(url, params=how, headers=build_hf_headers(), timeout=PATIENCE_S)
        hf_raise_for_status(answer)
        return [
            Hit(str(own["id"]), int(own.get("downloads") or 0)) for own in answer.json()[:limit]
        ]
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        wait = "wait a while" if status == 429 else "try again later"
        raise InputError(f"the hub answered a search with status {status}: {wait}.") from None
    except Exception as error:  # exceptions depend on the client's HTTP library
        raise InputError(
            f"the hub does not answer ({reason(error)}): check the network, or pass a full name, "
            "such as org/name, instead of searching."
        ) from None
