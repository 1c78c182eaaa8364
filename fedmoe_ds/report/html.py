"""`report.html`: one self-contained page about a run, built from metrics.jsonl and config.yaml alone."""

from __future__ import annotations

import html
from pathlib import Path
from string import Template

from fedmoe_ds.errors import UserError
from fedmoe_ds.report.activation import expert_section
from fedmoe_ds.report.device_time import device_section
from fedmoe_ds.report.headline import header
from fedmoe_ds.report.history import History
from fedmoe_ds.report.markup import Markup, join, tag
from fedmoe_ds.report.participants import client_section
from fedmoe_ds.report.population import data_section
from fedmoe_ds.report.record import Record
from fedmoe_ds.report.samples import sample_section
from fedmoe_ds.report.sections import (
    config_section,
    convergence_section,
    results_section,
    time_section,
    topology_section,
)
from fedmoe_ds.report.tasks import generation_section
from fedmoe_ds.storage.files import write_whole
from fedmoe_ds.terminal import visible

PARTS = Path(__file__).parent
PAGE = "report.html"
"""In the folder of every run."""


def write_report(run_folder: Path, target: Path | None = None) -> Path:
    """Build `<run_folder>/report.html`, or another file, and return its path; an older report is replaced in one step.

    Works for a run that is still going or was cut off: what is not recorded yet is said to be missing.

    Raises:
        UserError: the folder holds no readable metrics.jsonl.
        OSError: the page cannot be written.
    """
    history, config = read_history(run_folder), read_config(run_folder)
    target = run_folder / PAGE if target is None else target
    # Answers and samples hold what clients have written.
    write_whole(target, page(history, config), private=bool(history.generations or history.samples))
    return target


def read_history(run_folder: Path) -> History:
    """What a run has recorded. Raises UserError: no such folder, or it holds no readable metrics.jsonl."""
    if not run_folder.is_dir():
        raise UserError(f"run folder: {run_folder}: does not exist; name a folder like runs/<name>")
    return History.of(Record(run_folder / "metrics.jsonl"))


def read_config(run_folder: Path) -> str | None:
    """The text of its configuration, None where it holds none. Raises UserError where it cannot be read."""
    config_file = run_folder / "config.yaml"
    # A link may have been put there to have a secret printed.
    plain = config_file.is_file() and not config_file.is_symlink()
    try:
        return config_file.read_text(encoding="utf-8") if plain else None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"{config_file}: cannot be read: {reason}; restore it, or remove it") from None


def page(history: History, config: str | None) -> str:
    """The whole document as text. A run without experts says so, and has no section about them."""
    experts = ("experts", "Expert activation", _with_lead(EXPERT_LEAD, expert_section(history)))
    sections = [
        ("results", "Results", results_section(history)),
        ("convergence", "Convergence per tier", convergence_section(history)),
        ("answers", "Answers before and after", generation_section(history)),
        ("data", "How the data lie on clients", data_section(history)),
        ("samples", "What clients learn from", sample_section(history)),
        *([] if history.run.get("num_experts") == 0 else [experts]),
        ("devices", "Virtual time and energy", device_section(history)),
        ("time", "Where the time went", time_section(history)),
        ("clients", "Clients", client_section(history)),
        ("topology", "Topology", topology_section(history)),
        ("config", "Configuration", config_section(history, config)),
    ]
    # Answers and samples are text of clients: most runs show none, and then nothing speaks of them.
    shown = [(anchor, title, body) for anchor, title, body in sections if body is not None]
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in shown]
    bodies = [tag("section", tag("h2", title), body, id=anchor) for anchor, title, body in shown]
    body = join([header(history), tag("nav", *links, aria_label="sections"), tag("main", *bodies)])
    return document(str(history.run.get("name") or "run"), body)


def document(title: str, body: Markup) -> str:
    """A page around its content; it loads nothing from elsewhere."""
    # string.Template and not str.format: style and script are full of braces.
    return Template(_part("report.html")).substitute(
        # A name may hold control characters: a record can come from anybody.
        title=html.escape(visible(title)),
        style=_part("report.css"),
        script=_part("report.js"),
        body=body,
    )


EXPERT_LEAD = (
    "The share of routed slots that each expert received from the clients of a tier, relative to an even spread "
    "over all experts of the layer (1 ×)."
)


def _with_lead(text: str, body: Markup) -> Markup:
    return tag("div", tag("p", text, cls="lead"), body)


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")
