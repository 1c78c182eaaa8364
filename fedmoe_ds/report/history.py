"""A run as its metrics tell it: events sorted by kind, and the before/after of every tier."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmoe_ds.clients.tiers import tier_order
from fedmoe_ds.report import formats
from fedmoe_ds.report.by_client import TASK_METRICS as TASK_METRICS
from fedmoe_ds.report.by_client import OwnScores, Participation, RepeatedError, latest
from fedmoe_ds.report.by_client import tier_of as tier_of
from fedmoe_ds.report.holdings import Holdings
from fedmoe_ds.report.record import ROWS, expanded

Event = Mapping[str, Any]
Cells = list["array[int]"]
SPLITS = ("global", "clients")


@dataclass(frozen=True)
class TierResult:
    """Foundation (`before`) and last evaluated round (`after`) of one tier on one hold-out.

    An event without fields stands for an evaluation that has not happened; a value that was not finite is None.
    """

    split: str
    tier: str
    before: Event
    after: Event

    @property
    def ratio(self) -> float | None:
        """Perplexity after over before; below one is better."""
        before, after = self.before.get("perplexity"), self.after.get("perplexity")
        return after / before if before and after is not None else None

    @property
    def gain(self) -> float | None:
        """Accuracy after minus before, a difference of shares."""
        before, after = self.before.get("accuracy"), self.after.get("accuracy")
        return after - before if before is not None and after is not None else None

    @property
    def metrics(self) -> list[str]:
        """The task metrics of the two, in fixed order."""
        return [name for name in TASK_METRICS if name in self.before or name in self.after]

    @property
    def digits(self) -> int:
        """Decimals of the accuracies in percent that mean something, for the number of targets behind them."""
        rows = [row for row in (self.before, self.after) if row.get("accuracy") is not None]
        return min((formats.share_digits(row["accuracy"], formats.targets_of(row)) for row in rows), default=0)

    def task_digits(self, metric: str) -> int:
        """The same of a task metric, for its number of samples."""
        rows = [row for row in (self.before, self.after) if row.get(metric) is not None]
        return min((formats.share_digits(row[metric], row.get("samples")) for row in rows), default=0)


def tier_results(evaluations: Iterable[Event]) -> list[TierResult]:
    """Pair round 0 with the last later evaluation of every (split, tier): global hold-out first, high tiers first.

    Events of other kinds and the evaluations of single clients are passed over.
    """
    # By round: a round that was evaluated twice, before and after a resume, counts with its later row.
    cells: dict[tuple[str, str], dict[int, Event]] = {}
    for row in evaluations:
        if row.get("event", "eval") == "eval" and row.get("split") in SPLITS:
            cells.setdefault((row["split"], tier_of(row)), {})[row["round"]] = row
    order = sorted(cells, key=lambda cell: (SPLITS.index(cell[0]), tier_order(cell[1])))
    return [_result(split, tier, cells[split, tier]) for split, tier in order]


def _result(split: str, tier: str, by_round: Mapping[int, Event]) -> TierResult:
    last = max(by_round)
    # A run that has only the foundation's evaluation has no `after` yet.
    return TierResult(split, tier, before=by_round.get(0, {}), after=by_round[last] if last > 0 else {})


def hundredths(activation: Sequence[Sequence[float | None]]) -> Cells:
    """Shares of routed slots [L][E] as hundredths of the even share 1/E."""
    # Whole hundredths, packed: a long run has very many cells, and two digits are what one can see.
    return [array("I", (round(100 * len(layer) * (share or 0.0)) for share in layer)) for layer in activation]


def ending(events: Iterable[Event]) -> Event | None:
    """The `end` event; None where the run is going on, also because more rounds were asked for after its end."""
    end = None
    for event in events:
        if event["event"] in ("end", "resume"):
            end = event if event["event"] == "end" else None
    return end


@dataclass
class History:
    """Events by kind. A round that was recorded twice counts once, with its later record.

    What is said of single clients is gathered (`trained`, `own_scores`): a long run of many clients takes no more memory than a
    short one. `evaluations` are the pooled ones.
    """

    run: Event = field(default_factory=dict)
    data: Event = field(default_factory=dict)
    end: Event | None = None
    resumes: list[Event] = field(default_factory=list)
    evaluations: dict[tuple[int, str, str], Event] = field(default_factory=dict)
    trained: Participation = field(default_factory=Participation)
    own_scores: OwnScores = field(default_factory=OwnScores)
    rounds: dict[int, Event] = field(default_factory=dict)
    experts: dict[tuple[int, str], Cells] = field(default_factory=dict)
    generations: dict[tuple[int, int], Event] = field(default_factory=dict)
    samples: list[Event] = field(default_factory=list)
    _holdings: Holdings | None = None

    @property
    def before(self) -> str:
        """What round 0 is."""
        started_from = self.started_from
        return "the foundation" if started_from is None else f"what the run started from ({started_from})"

    @property
    def started_from(self) -> str | None:
        """The name of what the adapters began as (`adapters.start`), with the round of a run; None: of nothing."""
        start = self.run.get("start")
        if not start:
            return None
        return f"{start['name']}" + ("" if start.get("round") is None else f" after round {start['round']}")

    @classmethod
    def of(cls, events: Iterable[Event]) -> History:
        """Sort events; kinds this version does not know are passed over, so that newer files stay readable.

        Args:
            events: a `Record`, or a list; it may be read twice.
        Raises:
            UserError: of a `Record`: it, or a table beside it, cannot be read.
        """
        try:
            return cls._gathered(events)
        except RepeatedError:
            # No run writes such a record, but somebody may have joined two: only here all rows are held at once.
            return cls._gathered(latest(one for event in events for one in expanded(dict(event))))

    @classmethod
    def _gathered(cls, events: Iterable[Event]) -> History:
        history = cls()
        for event in events:
            history._add(event)
        history.trained.close()
        history.own_scores.close()
        return history

    def _add(self, event: Event) -> None:
        match event["event"]:
            case "run":
                self.run = event
            case "data":
                self.data = event
            case "sample":
                self.samples.append(event)
            case "end":
                self.end = event
            case "resume":
                self.resumes.append(event)
                # A run that goes on has not ended: more rounds were asked for after its end.
                self.end = None
            case "eval":
                if event["split"] != "client":
                    self.evaluations[event["round"], event["split"], tier_of(event)] = event
                elif event.get("client") is not None:
                    self.own_scores.see(event)
            case "client":
                self.trained.see(event)
            case "table":
                gathered = self.trained if event["of"] == "client" else self.own_scores
                gathered.see_table(event[ROWS])
            case "round":
                self.rounds[event["round"]] = event
            case "experts":
                self.experts[event["round"], tier_of(event)] = hundredths(event["activation"])
            case "generation":
                self.generations[event["round"], event["sample"]] = event

    @property
    def holdings(self) -> Holdings:
        """What every client has."""
        if self._holdings is None or self._holdings.event is not self.data:
            self._holdings = Holdings(self.data)
        return self._holdings

    @property
    def tiers(self) -> list[str]:
        """Every tier that the run names or that an event mentions, highest first."""
        # Older records list top-k values only.
        budgets = self.run.get("budgets")
        seen = {str(cap) for cap in self.run.get("tiers") or []} if budgets is None else {tier_of(budget) for budget in budgets}
        seen |= self.holdings.tiers_present
        seen |= {tier for _, split, tier in self.evaluations if split in SPLITS}
        seen |= {tier for _, tier in self.experts}
        return sorted(seen, key=tier_order)

    @property
    def topology(self) -> list[Event]:
        """The rank table of the last start of the run."""
        tables = [event["topology"] for event in [self.run, *self.resumes] if event.get("topology")]
        return list(tables[-1]) if tables else []

    @property
    def last_round(self) -> int:
        """The last completed round; 0 before the first."""
        # From what is recorded, not from the configuration: the run may still be going.
        return max(self.rounds, default=0)

    def curve(self, split: str, tier: str, metric: str) -> list[tuple[int, float | None]]:
        """(round, value) in order of rounds for one tier on one pooled hold-out."""
        rows = [(key[0], row) for key, row in self.evaluations.items() if key[1:] == (split, tier)]
        return sorted((round_, row.get(metric)) for round_, row in rows)

    def client_names(self) -> list[str]:
        """All clients, those with data first in their order, then any that only trained."""
        # A dict keeps the order of the data and drops names seen before.
        return list(dict.fromkeys([*self.holdings.names, *self.trained.places]))
