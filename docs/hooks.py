"""What MkDocs adds to the pages that are written by hand: every command, every module, every page of results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from harness.cli import app

PACKAGES = ("fusion", "baselines", "results", "harness")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    assert config.nav is not None
    runs = sorted(file.src_uri for file in files if Path(file.src_uri).match("results/*/README.md"))
    config.nav.append({"Results": ["results/README.md", *runs]})
    for title, pages in (("Commands", list(_commands())), ("Reference", list(_modules()))):
        place = title.lower()
        for name, text in pages:
            files.append(File.generated(config, f"{place}/{name}.md", content=text))
        config.nav.append({title: [{name.replace("-", " "): f"{place}/{name}.md"} for name, _ in pages]})
    return files


def _commands() -> Iterator[tuple[str, str]]:
    """Name and Markdown of every command, as typer's own `utils docs` writes it."""
    program: Any = typer.main.get_command(app)
    for name, command in program.commands.items():
        for own, one in {"": command, **getattr(command, "commands", {})}.items():
            if hasattr(one, "commands"):  # a group, whose commands have pages of their own
                continue
            words = " ".join(["fusellm", name, own]).strip()
            with typer.Context(program) as context:
                yield f"{name}-{own}".strip("-"), get_docs_for_click(obj=one, ctx=context, name=words)


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(__file__).parents[1]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] != "__init__" and not parts[-1].startswith("_"):
                name = ".".join(parts)
                yield name, f"# {name}\n\n::: {name}\n    options: {{show_root_heading: false}}\n"
