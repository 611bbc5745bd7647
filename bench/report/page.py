"""``python -m bench.report.page FILE.json``: one self-contained HTML page of result files."""

from __future__ import annotations

import argparse
import json
import string
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from bench.report import plot
from bench.report.markup import Document, cell, figure, figures, line, table
from bench.report.sections import write_sections
from bench.report.wording import number
from bench.rows import read_results


def page(paths: Sequence[Path], trained: Path | None = None) -> str:
    """The HTML of result files, each with its own machine, and of a ``results.json`` that ``hydravit evaluate`` wrote.

    Raises ``ValueError`` or ``OSError`` for other files.
    """
    files = [read_results(path) for path in paths]
    document = Document()
    for environment, rows in files:
        write_sections(environment, rows, document, titled=len(files) > 1)
    if trained is not None:
        _accuracy(trained, document)
    names = dict.fromkeys(str(environment.get("name") or "unnamed machine") for environment, _ in files)
    title = escape(f"hydravit benchmark: {', '.join(names)}")
    links = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text in document.contents)
    here = Path(__file__)
    template = string.Template(here.with_suffix(".html").read_text(encoding="utf-8"))
    style = here.with_suffix(".css").read_text(encoding="utf-8")
    return template.substitute(title=title, style=style, links=links, body=document.text())


def _accuracy(path: Path, document: Document) -> None:
    try:
        trained = json.loads(Path(path).read_text())
        setup, widths = trained["environment"], trained["widths"]
        lines = []
        for row in widths:
            latency = row["latency_ms"]
            cells = [f"{row['top1']:.2f}", number(row["gmacs"]), number(latency["eager"]), number(latency["fused"])]
            lines.append(line(str(row["heads"]), map(cell, cells)))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results.json of hydravit evaluate: {error!r}") from error
    document.heading("Accuracy against latency")
    told = [f"{key} {setup[key]}" for key in ("images", "cpu", "threads", "torch", "backend", "commit") if key in setup]
    document.add(f"<p>A trained model at every width, on held-out images: {escape(', '.join(told))}.</p>")
    if any(value is not None for row in widths for value in row["latency_ms"].values()):
        svg = plot.accuracy(trained, label=document.label("Top-1 accuracy in percent against latency"))
        document.add(figures(figure("Top-1 accuracy, %", "the numbers are heads", svg)))
    head = ["heads", "top-1, %", "GMACs", "eager, ms", "fused, ms"]
    document.add(table("Accuracy, cost and latency of one image", head, ["\n".join(lines)]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report.page", description="One self-contained HTML page.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--trained", type=Path, metavar="FILE", help="results.json of hydravit evaluate --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: beside the first file, with .html")
    args = parser.parse_args()
    out = args.out or args.files[0].with_suffix(".html")
    try:
        out.write_text(page(args.files, args.trained), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("wrote", out)


if __name__ == "__main__":
    main()
