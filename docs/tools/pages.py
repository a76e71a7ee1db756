"""Pages of the site that are not written by hand, as a hook of mkdocs.

The README is the site's home, and CONTRIBUTING, the change log and the notebooks are pages too.
Settings, commands and the reference of the API come from the code. Other files of the repository
that a page links to are copied into the site.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

import scalabl_pyro as sp
from scalabl_pyro.commands._help import explain
from scalabl_pyro.commands.cli import COMMANDS
from scalabl_pyro.data import Columns
from scalabl_pyro.infer import CheckpointConfig, FitConfig, KLSchedule
from scalabl_pyro.lora import AdapterConfig, ModelConfig
from scalabl_pyro.methods import METHODS
from scalabl_pyro.prediction import Decoding
from scalabl_pyro.runs import DataConfig, PredictionConfig, RunConfig
from scalabl_pyro.runs.config import SHARED

ROOT = Path(__file__).resolve().parents[2]

#: files of the repository that are pages → the page
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "notebooks/01_quickstart.ipynb": "quickstart.md",
    "notebooks/02_guides_and_priors.ipynb": "guides_and_priors.md",
    "notebooks/03_is_it_right.ipynb": "is_it_right.md",
    "notebooks/04_what_prediction_costs.ipynb": "what_prediction_costs.md",
    "notebooks/05_what_it_does_not_know.ipynb": "what_it_does_not_know.md",
    "notebooks/06_a_real_model.ipynb": "a_real_model.md",
    "notebooks/07_your_own.ipynb": "your_own.md",
}
#: the sections of a run's settings, and what they are as Python classes
SECTIONS = {
    "model": ModelConfig,
    "lora": AdapterConfig,
    "data": DataConfig,
    "data.columns": Columns,
    "fit": FitConfig,
    "fit.kl": KLSchedule,
    "checkpoint": CheckpointConfig,
    "prediction": PredictionConfig,
    "decoding": Decoding,
}
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)(#[^)\s]*)?(?=\))")
FORMULA = re.compile(r"\$([^$\n]+)\$")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, and the files that pages link to."""
    made = {page: _text_of(source) for source, page in PAGES.items()}
    made |= {"settings.md": _settings(), "commands.md": _commands()}
    made |= {f"api/{name}.md": text for name, text in _api()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    linked = {place for f in list(files.documentation_pages()) for place in _outside(f)}
    for place in sorted(linked):
        copy = File.generated(config, f"files/{place}", abs_src_path=str(ROOT / place))
        files.append(copy)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links to files of the repository into links to their pages or copies."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = _target(_source(here), match[1])
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (match[2] or "")

    return LINK.sub(moved, _without_folders(markdown, _source(here)))


def _source(page: str) -> str:
    """The place in the repository of what a page is made from."""
    return {made: source for source, made in PAGES.items()}.get(page, f"docs/{page}")


def _target(source: str, link: str) -> str:
    """Where a link in a file of the repository leads in the site."""
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if place in PAGES:
        return PAGES[place]
    return place.removeprefix("docs/") if place.startswith("docs/") else f"files/{place}"


def _outside(file: File) -> Iterator[str]:
    """Files of the repository that a page links to, and that are no pages."""
    source = _source(file.src_uri)
    for link, _ in LINK.findall(FENCE.sub("", file.content_string)):
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if place not in PAGES and not place.startswith("docs/") and (ROOT / place).is_file():
            yield place


def _without_folders(markdown: str, source: str) -> str:
    """A site does not serve folders: of links to them the text stays."""

    def plain(match: re.Match[str]) -> str:
        return match[1] if (ROOT / posixpath.dirname(source) / match[2]).is_dir() else match[0]

    return re.sub(r"\[([^\]]+)\]\((?!\w+:)([^)\s#]+)\)", plain, markdown)


def _text_of(source: str) -> str:
    path = ROOT / source
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    # Text of objects rather than their HTML, whose style sheets are not the site's.
    exporter = MarkdownExporter()
    exporter.exclude_input_prompt = True
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(lambda match: convert(match[1]), cell.source)
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture:
                output["data"] = {"text/markdown": f"![](data:image/png;base64,{picture.strip()})"}
            else:
                output.get("data", {}).pop("text/html", None)
    text, _ = exporter.from_notebook_node(notebook)
    return text


@cache
def _parameters(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        text = inspect.cleandoc(base.__doc__ or "")
        for name, meaning in re.findall(r"^:param (\w+): (.*?)(?=^:|^\S|\Z)", text, re.M | re.S):
            found[name] = " ".join(_plain(meaning).split())
    return found


def _plain(text: str) -> str:
    """reStructuredText's roles and literals as Markdown's code."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|")


def _table(cls: type, skip: tuple[str, ...] = ()) -> str:
    """The fields of a dataclass: name, type, default and meaning.

    :raises LookupError: if a field has no meaning.
    """
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        if field.name not in _parameters(cls):
            raise LookupError(f"the docstring of {cls.__name__} has no :param {field.name}:")
        kind = str(field.type).replace(" | ", " or ")
        meaning = _parameters(cls)[field.name]
        lines.append(f"| `{field.name}` | `{kind}` | {_default(field)} | {meaning} |")
    return "\n".join(lines)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "needed"
    return "the section's" if dataclasses.is_dataclass(value) else f"`{value!r}`"


def _settings() -> str:
    parts = [
        "# Settings",
        "Settings are [Hydra](https://hydra.cc) overrides on the command line, such as"
        " `fit.lr=1e-3` for `lr` of the section `fit`, and fields of frozen dataclasses in Python."
        " This page is made from the classes. What a command sets by default is under"
        " [commands](commands.md).",
        "## A run\n\nSettings of `scalabl train` outside of the sections below"
        " (`scalabl_pyro.runs.RunConfig`).",
        _table(RunConfig, skip=("model", "lora", "data", "fit", "checkpoint")),
    ]
    for name, cls in SECTIONS.items():
        nested = {s.rpartition(".")[2] for s in SECTIONS if s.startswith(f"{name}.")}
        title = f"## {name}\n\n`{cls.__module__.rpartition('.')[0]}.{cls.__name__}`"
        parts += [title, _table(cls, skip=tuple(nested))]
    parts += ["## method", "Each method has settings of its own, under `method`."]
    for name, method in METHODS.items():
        own = [f.name for f in dataclasses.fields(method) if f.name not in SHARED]
        rates = f"`fit.lr={method.config.lr:g} fit.kl.weight={method.config.kl.weight:g}`"
        parts.append(f"### {name}\n\n{_plain(inspect.getdoc(method).splitlines()[0])}")
        parts.append(f"Trains with {rates} unless told otherwise.")
        if own:
            parts.append(_table(method, skip=tuple(SHARED)))
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    parts = [
        "# Commands",
        "What `scalabl COMMAND --help` prints. A setting that does not exist is refused.",
    ]
    for name in COMMANDS:
        parts.append(f"## scalabl {name}\n\n```yaml\n{explain(name).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _api() -> Iterator[tuple[str, str]]:
    """A page for the names of the package itself, and one for each of its folders."""
    stub = ast.parse(Path(sp.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    homes = {a.name: node.module for node in imports if node.module for a in node.names}
    names = "\n".join(f"| `sp.{name}` | [{home}]({home}.md) |" for name, home in homes.items())
    yield (
        "index",
        "# API\n\nNames of the package itself, with `import scalabl_pyro as sp`, and where they"
        f" come from.\n\n| name | folder |\n|---|---|\n{names}\n",
    )
    for home in sorted(set(sp.__all__) - homes.keys() | set(homes.values())):
        parts = [f"# scalabl_pyro.{home}", f"::: scalabl_pyro.{home}"]
        folder = import_module(f"scalabl_pyro.{home}")
        for name in folder.__all__:
            # A file of the same name hides a function from who reads the code without running it.
            if (Path(folder.__file__).parent / f"{name}.py").exists():
                place = f"scalabl_pyro.{home}.{name}"
                place += "" if inspect.ismodule(getattr(folder, name)) else f".{name}"
                parts.append(f"::: {place}\n    options: {{show_root_heading: true}}")
        yield home, "\n\n".join(parts) + "\n"
