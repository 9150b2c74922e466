"""All results as one HTML page that needs no other file."""

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from minrnn.experiments.results import FIGURES, PICTURE
from minrnn.files import write_atomically

_TITLES = {
    "shakespeare": "Language models on tiny Shakespeare",
    "selective-copying": "Selective copying",
    "d4rl": "Offline reinforcement learning",
    "efficiency": "Time and memory over length",
}
# wide tables scroll by themselves, so that the page fits a phone
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
img { width: 100%; height: auto; } nav a { margin-right: 1rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
code { background: #f2f2f2; padding: 0.1rem 0.3rem; overflow-wrap: anywhere; }
.facts { font-size: 0.8rem; color: #555; }
"""


def write(folder: Path, out: Path) -> list[str]:
    """Write the page of every experiment that has results in `folder`.

    Args:
        folder: holds a folder for each experiment.
        out: the HTML file.

    Returns:
        The names of the experiments on it.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: a file of figures is damaged.
    """
    found = {name: folder / name for name in _TITLES if (folder / name / FIGURES).is_file()}
    if not found:
        raise FileNotFoundError(f"{folder} holds no results; minrnn reproduce NAME makes them")
    sections = [_section(name, path) for name, path in found.items()]
    links = "".join(f'<a href="#{name}">{escape(_TITLES[name])}</a>' for name in found)
    html = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Were RNNs all we needed? The tables, measured again</title>
<style>{_STYLE}</style></head><body>
<h1>Were RNNs all we needed? The tables, measured again</h1>
<p>Feng, Tung, Ahmed, Bengio, Hajimirsadeghi 2024, <a href="https://arxiv.org/abs/2410.01201">
arXiv:2410.01201</a>, beside what these commands measured.</p>
<nav>{links}</nav>
{"".join(sections)}
</body></html>
"""
    write_atomically(out, html.encode())
    return list(found)


def _section(name: str, folder: Path) -> str:
    try:
        figures = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
        tables = "".join(_table(table) for table in figures["tables"])
        machine, versions = figures["machine"], figures["versions"]
        facts = f"{figures['date']}, commit {figures['commit']}, {machine['processor']}, "
        facts += f"{machine['threads']} threads, torch {versions['torch']}"
        origins = {
            f"{run['date'][:10]}, commit {run['commit'][:12]}, {run['processor']}"
            for run in figures.get("runs", ())
            if "commit" in run
        }
        if origins:
            facts += "; runs of " + "; ".join(sorted(origins))
        command = figures["command"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / FIGURES} is damaged: {error!r}") from error
    picture = base64.b64encode((folder / PICTURE).read_bytes()).decode()
    return f"""<h2 id="{name}">{escape(_TITLES[name])}</h2>
<p><code>{escape(command)}</code></p>
<img alt="{escape(_TITLES[name])}" src="data:image/png;base64,{picture}">
{tables}<p class="facts">{escape(facts)}</p>
"""


def _table(table: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table["head"])
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table["rows"]
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in table["notes"])
    title = f"<h3>{escape(table['title'])}</h3>"
    return f'{title}<div class="table"><table><tr>{head}</tr>{rows}</table></div>{notes}\n'
