"""What attacks on the files of a server share: a file outside, whose content nobody may see."""

CANARY = "canary-8d1f4c-must-not-be-seen"


def write_canary(folder):
    """A folder that no server may use, with a secret in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "secret").write_text(CANARY)
    (folder / "train.jsonl").write_text(f'{{"text": "{CANARY}"}}\n' * 4)
    (folder / "default.jinja").write_text(CANARY)
    return folder
