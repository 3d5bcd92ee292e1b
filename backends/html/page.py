"""Pages from fragments: a template, and each style and script once, in the page itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

PACKAGE = "e2pass.backends.html"


@dataclass(frozen=True)
class Asset:
    """A style sheet or script by name; pages include each name once.

    Attributes:
        name: File name.
        text: Its content, trusted: it goes into the page as it is.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Fragment:
    """A piece of a page.

    Attributes:
        body: HTML with everything from user models escaped.
        styles: Style sheets it needs, in order.
        scripts: Scripts it needs, in order; they run after the bodies of all fragments.
        wasm: Whether they compile WebAssembly, which a page has to allow.
    """

    body: Markup
    styles: tuple[Asset, ...] = ()
    scripts: tuple[Asset, ...] = ()
    wasm: bool = False


@cache
def asset(path: str, package: str = PACKAGE) -> Asset:
    """A file of a package, such as ``static/report.css`` or ``vendor/echarts.common.min.js`` of this one."""
    text = resources.files(package).joinpath(path).read_text(encoding="utf-8")
    return Asset(path.rpartition("/")[2], text)


@cache
def environment(package: str = PACKAGE) -> Environment:
    """A package's templates; everything they insert is escaped, and an undefined name is an error."""
    made = Environment(
        loader=PackageLoader(package, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"sort_keys": False}  # the order of views is what the reader sees
    return made


def page(title: str, fragments: Iterable[Fragment]) -> str:
    """A whole page that opens from disk and is forbidden to load anything.

    Args:
        title: Text of the window's title.
        fragments: What it shows, from top to bottom.
    """
    parts = list(fragments)
    styles = {a.name: a for part in parts for a in part.styles}
    scripts = {a.name: a for part in parts for a in part.scripts}
    for script in scripts.values():
        if "</script" in script.text.lower():
            raise ValueError(f"{script.name} would end its own script element")
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            wasm=any(part.wasm for part in parts),
            bodies=[part.body for part in parts],
            styles=[Markup(a.text) for a in styles.values()],
            scripts=[Markup(a.text) for a in scripts.values()],
        )
    )
