"""Writes the API reference from docstrings, as HTML; fails if a public name has none.

python scripts/api_page.py build/api
"""

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc
import pdoc.doc
import pdoc.render

import mlx_kvq

MODULES = ("mlx_kvq", "mlx_kvq.ops")


def undocumented(page: pdoc.doc.Namespace) -> Iterator[str]:
    """Modules, functions, classes, methods and properties without a docstring of their own."""
    if not page.docstring:
        yield page.fullname
    for member in page.own_members:
        if isinstance(member, pdoc.doc.Class):
            yield from undocumented(member)
        called = isinstance(member, pdoc.doc.Function) and not member.name.startswith("_")
        is_property = isinstance(vars(page.obj).get(member.name), property)
        if (called or is_property) and not member.docstring:
            yield member.fullname


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(";")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name in mlx_kvq.__all__:  # loaded on first use; pdoc looks at what is there
        getattr(mlx_kvq, name)
    warnings.simplefilter("error")
    pages = [pdoc.doc.Module.from_name(name) for name in MODULES]
    if missing := [name for page in pages for name in undocumented(page)]:
        sys.exit(f"without a docstring: {', '.join(missing)}")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(MODULES[0], output_directory=folder)  # and what its __all__ names
    print(f"{len(pages)} pages: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
