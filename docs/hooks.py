"""MkDocs hooks that add generated pages, linked files, and the README as the first page.

Pages link to each other and to files of the repository by relative paths, so the links also work
on a code host. On the site, a page of docs/ keeps its name, README.md becomes index.md, and any
other file that a page links to is below repository/.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
#: Folders have no pages. Maps each folder to the page that a link to the folder should open.
FOLDERS = {"recipes": "recipes.md", "docs": "index.md", "examples": "python.md"}
#: Maps a requirement of a code block (the word after `needs:` in its fence) to the title that
#: readers see.
NEEDS = {
    "cuda": "needs an NVIDIA GPU",
    "mac": "needs a Mac with Apple silicon",
    "network": "needs the network",
    "hosts": "needs several machines",
    "packages": "needs other packages",
    "checkout": "in a checkout; takes minutes",
    "server": "while the server runs",
}
FENCE = re.compile(r"^(```\w+) needs: (\w+)$", re.M)


def on_files(files: Files, config) -> Files:
    """Adds the generated pages, and every repository file that a page links to."""
    for uri, text in references().items():
        files.append(File.generated(config, uri, content=text))
    todo = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    todo += [ROOT / page.removeprefix("repository/") for page in _pages(config["nav"])]
    for source in todo:  # grows in the loop: linked pages also have links
        if not source.is_file():
            continue
        path = PurePosixPath(source.relative_to(ROOT).as_posix())
        if files.get_file_from_path(uri := uri_of(path)) is None:
            files.append(File.generated(config, uri, abs_src_path=str(source)))
        if source.suffix == ".md":
            links = LINK.findall(source.read_text(encoding="utf-8"))
            found = (Path(os.path.normpath(source.parent / link)) for link in links)
            todo += [file for file in found if file not in todo and file.is_file()]
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Returns a page with its links adapted to the site, and with titles for code blocks that have
    requirements."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    origin = source_of(uri)

    def link(match: re.Match[str]) -> str:
        path = PurePosixPath(os.path.normpath(origin.parent / match[1]))
        return os.path.relpath(uri_of(path), PurePosixPath(uri).parent)

    markdown = FENCE.sub(lambda m: f'{m[1]} title="{NEEDS[m[2]]}"', markdown)
    return LINK.sub(link, markdown)


def uri_of(path: PurePosixPath) -> str:
    """Returns the site path of a repository file."""
    if str(path) in FOLDERS:
        return FOLDERS[str(path)]
    if str(path) == "README.md":
        return "index.md"
    return str(path.relative_to("docs") if path.parts[0] == "docs" else "repository" / path)


def source_of(uri: str) -> PurePosixPath:
    """Returns the repository file that contains the text of a site page."""
    if uri == "index.md":
        return PurePosixPath("README.md")
    path = PurePosixPath(uri)
    own = path.parts[0] == "repository"
    return path.relative_to("repository") if own else "docs" / path


def references() -> dict[str, str]:
    """Returns the text of the reference pages, keyed by their path on the site."""
    return {
        "reference/cli.md": command_line(),
        "reference/http.md": http(),
        "reference/python.md": python(),
    }


def command_line() -> str:
    """Returns a page with every command and its help, generated from the parser."""
    os.environ["COLUMNS"] = "100"
    from mlx_segtrain.commands.main import parsers

    parts = ["# Commands and options", "Generated from `mlx-segtrain COMMAND --help`."]
    parser, commands = parsers()
    for name, own in {"": parser, **commands}.items():
        title = f"mlx-segtrain {name}".strip()
        parts += [f"## {title}", f"```text\n{own.format_help(all=True).rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def http() -> str:
    """Returns a page with every route and its fields, generated from the OpenAPI document."""
    from fastapi import FastAPI

    from mlx_segtrain.serving.app import ROUTERS

    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    document = app.openapi()
    parts = [
        "# HTTP API",
        "Generated from the server's OpenAPI document, which a running server returns at "
        "`/openapi.json` and displays at `/docs`. [Serving](../serving.md) explains the routes.",
    ]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts += [f"## `{method.upper()} {path}`", _sentence(route)]
            rows = [
                (f"`{own['name']}`", own["in"], _kind(own["schema"]), own.get("description", ""))
                for own in route.get("parameters", ())
            ]
            for content in route.get("requestBody", {}).get("content", {}).values():
                rows += _fields(content["schema"], document)
            if rows:
                table = ["| field | in | type | meaning |", "|---|---|---|---|"]
                cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
                parts.append("\n".join([*table, *(f"| {row} |" for row in cells)]))
    return "\n\n".join(parts) + "\n"


def python() -> str:
    """Returns a page with the public names and their docstrings."""
    import mlx_segtrain

    homes = mlx_segtrain._HOME
    names = [f"::: mlx_segtrain.{homes[name]}.{name}" for name in sorted(homes)]
    return "\n\n".join(["# Python API", "[Python](../python.md) shows how to use the API.", *names])


def _pages(nav) -> list[str]:
    """Returns all pages that the navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in _pages(part)]


def _sentence(route: dict) -> str:
    return " ".join((route.get("description") or route.get("summary") or "").split())


def _fields(schema: dict, document: dict) -> list[tuple[str, str, str, str]]:
    """Returns a table row for each field of a request body."""
    own = _resolved(schema, document)
    needed = own.get("required", ())
    return [
        (
            f"`{name}`",
            "body, required" if name in needed else "body",
            _kind(field),
            " ".join(_resolved(field, document).get("description", "").split()),
        )
        for name, field in own.get("properties", {}).items()
    ]


def _resolved(schema: dict, document: dict) -> dict:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _kind(schema: dict) -> str:
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(map(_kind, schema[key])))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))
