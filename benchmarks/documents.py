"""Where the results stand in the project: benchmarks/RESULTS.md, the README's part on speed, and the plots."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import report, results
from benchmarks.machine import ROOT

BLOCKS = {ROOT / "README.md": "how-fast", ROOT / "benchmarks" / "RESULTS.md": "results"}


def write(path: Path, out: Path | None) -> list[Path]:
    """All of it from one result file; what was written. With `out` nothing but that folder is touched."""
    from benchmarks import plots  # matplotlib is large, and only this needs it

    found = results.read(path)
    if out is not None:
        drawn = plots.draw(found, path.name, out / "plots")
        document = out / "RESULTS.md"
        document.write_text("\n".join(["# Results", "", *report.placed(report.everything(path), folder=""), ""]))
        return [document, *drawn]
    for document, name in BLOCKS.items():
        document.write_text(with_block(document.read_text(), name, content(name, path)))
    return [*BLOCKS, *plots.draw(found, path.name)]


def content(name: str, path: Path | None = None) -> list[str]:
    """The lines of a block, of the latest results unless told otherwise."""
    if name == "how-fast":
        return report.placed(report.how_fast(path), folder="benchmarks/")
    return report.placed(report.everything(path), folder="")


def with_block(text: str, name: str, lines: list[str]) -> str:
    """A document with this content between `generated` comments."""
    block = re.compile(rf"(<!-- generated: {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    return block.sub(lambda found: found[1] + "\n".join([*lines, found[3]]), text)
