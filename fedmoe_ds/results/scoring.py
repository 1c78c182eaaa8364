"""Scoring: the figures of a finished run, or of a model folder, by the evaluator of training.

On the run's own hold-outs they are those of its `eval` events, to the last digit; on other rows the same, over all of them. As
a matrix, every client's rows are scored by the global model of each tier and by clients' own models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmoe_ds.config import Config
from fedmoe_ds.data import FederatedData, prepare
from fedmoe_ds.data.given import GivenData, given_data
from fedmoe_ds.data.sources import source_name
from fedmoe_ds.data.templates.reading import reading_line
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.evaluation import Evaluator, ReadPart, Score
from fedmoe_ds.federation.schedule import participants_per_round
from fedmoe_ds.federation.server_training import epochs_of
from fedmoe_ds.foundation.foundation import cache_folder
from fedmoe_ds.report.history import History
from fedmoe_ds.results.loaded_model import LoadedModel
from fedmoe_ds.results.trained_run import TrainedRun
from fedmoe_ds.storage import cache

Note = Callable[[str], None]
GLOBAL = "global"
"""The model of a tier in a matrix."""


@dataclass(frozen=True)
class Request:
    """What is to be scored.

    Attributes:
        tier: a label; None: all tiers.
        matrix: score every client's rows apart.
        clients: the clients whose own models take part; with `matrix` and none named, all whose models are personal.
        before: also the adapters as they were before the first round.
    """

    tier: str | None = None
    matrix: bool = False
    clients: Sequence[str] = ()
    before: bool = False


@dataclass(frozen=True)
class Row:
    """One row of figures.

    Attributes:
        round: rounds that the model has been trained for; None for a model folder.
        model: in a matrix, `global` or the name of the client whose model it is; else None.
    """

    score: Score
    round: int | None
    model: str | None = None

    def figures(self) -> dict[str, Any]:
        """As lines and files hold it: fields that do not apply are left out, what is not finite is None."""
        score = self.score
        found: dict[str, Any] = {"round": self.round, "tier": score.tier, "tier_label": score.label, "split": score.split}
        found |= {"client": score.client, "model": self.model}
        found = {key: value for key, value in found.items() if value is not None}
        shares = {"perplexity": score.perplexity, "accuracy": score.accuracy, "loss": score.loss, **score.metrics}
        counts = {"samples": score.samples, "targets": score.targets, "tokens": score.tokens}
        return found | {key: value if math.isfinite(value) else None for key, value in shares.items()} | counts


@dataclass(frozen=True)
class Scores:
    """Rows of figures, and what else an output says: lines about the data, and facts for the file."""

    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)


def score_run(run: TrainedRun, config: Config, given: bool, request: Request, note: Note) -> Scores:
    """Figures of a run, on its own hold-outs or (`given`) on all rows of `config.data`.

    Raises:
        UserError: tier, client, data and model do not go together, or the run's own data are not there any more.
    """
    # Names first: they cost nothing, and weights and data may take minutes.
    tier = None if request.tier is None else run.select(request.tier).tier
    for name in request.clients:
        client_tier = run.select(client=name).tier
        if tier not in (None, client_tier):
            raise UserError(
                f"--tier: {tier}: with --client {name}: a client's model is that of its own tier ({client_tier}); drop --tier"
            )
    started_from = History.of([event for event in run.events if event["event"] == "run"]).started_from
    if request.before and started_from is not None:
        note(f"--before: round 0 is the foundation here; in the run's own record it is what that started from, {started_from}")
    if request.before and epochs_of(config, 0):
        note("--before: round 0 is the foundation here; in the run's own record it comes after the server's warm-up")
    loaded = LoadedModel.of_run(run, config, before=request.before)
    data = _given(loaded, request, note) if given else _own(run, loaded, note)
    return _scores(loaded, data, tier, request, {"checkpoint": run.checkpoint.name, "method": run.config.method.name})


def score_model(config: Config, request: Request, note: Note) -> Scores:
    """Figures of a model folder on all rows of `config.data`. Raises UserError as `score_run`."""
    if request.before:
        raise UserError("--before: a model folder has no rounds; give a run, or drop --before")
    loaded = LoadedModel.of_folder(config, note)
    for tier, client in ((request.tier, None), *((None, name) for name in request.clients)):
        loaded.select(tier, client)
    return _scores(loaded, _given(loaded, request, note), None, request, {})


def _given(loaded: LoadedModel, request: Request, note: Note) -> GivenData:
    config, foundation = loaded.spec.config, loaded.foundation
    root = cache.root(config.foundation.cache)
    data = given_data(config.data, foundation.tokenizer, root, foundation.code, request.matrix, note, config.seed)
    _tell(data, note)
    return data


def _own(run: TrainedRun, loaded: LoadedModel, note: Note) -> FederatedData:
    """The data of a run, prepared as at its start; what it learnt from must not be scored for what it held out."""
    config, foundation = loaded.spec.config, loaded.foundation
    folder = cache_folder(config.foundation, "data")
    data = prepare(config.data, config.seed, foundation.tokenizer, folder, foundation.code, note, config.federation.tier_column)
    if data.fingerprint != run.snapshot.identity.get("data"):
        raise UserError(
            f"data.source: {source_name(config.data.source)}: not the data of this run any more, so its hold-outs are not "
            "these; restore them, or give --data FILE"
        )
    _tell(data, note)
    return data


def _tell(data: GivenData | FederatedData, note: Note) -> None:
    for line in (reading_line(data.reading), data.omissions.line()):
        if line is not None:
            note(line)


def _scores(
    loaded: LoadedModel, data: GivenData | FederatedData, tier: str | None, request: Request, facts: dict[str, Any]
) -> Scores:
    # Nobody trains here, so what a run had in flight on all of its clusters (null) says nothing about this machine.
    asked = loaded.spec.config.execution.clients_in_flight or 1
    in_flight = min(asked, participants_per_round(loaded.spec, len(loaded.clients)))
    evaluator = Evaluator(loaded.spec, loaded.received.model, loaded.runtime, loaded.adapters, data, loaded.clients, in_flight)
    rows: list[Row] = []
    if request.before:
        rows += _rows(loaded, evaluator, tier, request, 0)
        loaded.restore()
    rows += _rows(loaded, evaluator, tier, request, None if loaded.run is None else loaded.run.round)
    facts |= {"data": source_name(loaded.spec.config.data.source), "omissions": data.omissions.as_dict()}
    return Scores(rows, facts)


def _rows(loaded: LoadedModel, evaluator: Evaluator, tier: str | None, request: Request, round_index: int | None) -> list[Row]:
    if request.matrix:
        return [Row(score, round_index, model) for model, score in _matrix(loaded, evaluator, tier, request.clients)]
    own, plain = isinstance(evaluator.data, FederatedData), not loaded.trained
    per_client = own and evaluator.config.client_sequences > 0
    scores = evaluator.scores(loaded.personal, per_client, plain, None if tier is None else {tier})
    return [Row(score, round_index) for score in scores]


def _matrix(loaded: LoadedModel, evaluator: Evaluator, tier: str | None, named: Sequence[str]) -> Iterator[tuple[str, Score]]:
    """(model, score) of every client's rows: by each tier's global model, then by clients' own, in the order of the clients."""
    owners, personal, plain = _owners(evaluator), loaded.personal, not loaded.trained
    for label, members in evaluator.tiers.items():
        if tier in (None, label):
            evaluator.load_mean(members, personal, plain)
            how = evaluator.assigned(members[0], personal, plain, own=False)
            yield from ((GLOBAL, score) for score in evaluator.owner_scores(members[0], owners, how))
    for client in loaded.clients:
        asked = client.name in named if named else loaded.spec.method.personal_models
        # Before the first round everybody's own model is the foundation, which stands there already.
        if asked and not plain and tier in (None, client.tier):
            evaluator.load_own(client, personal)
            how = evaluator.assigned(client, personal, plain)
            yield from ((client.name, score) for score in evaluator.owner_scores(client, owners, how))


def _owners(evaluator: Evaluator) -> dict[str, list[ReadPart]]:
    """What is scored of every client: its hold-out as in training, a pass, or all of its given rows in batches."""
    data = evaluator.data
    if isinstance(data, GivenData):
        return {name: evaluator.batches(rows, evaluator.config.max_sequences) for name, rows in data.owners.items()}
    found = {c.name: [evaluator.client_part(c)] for c in evaluator.clients if len(data.holdout(c.index))}
    if not found or not evaluator.config.client_sequences:
        raise UserError(
            "--clients: no client has a hold-out that counts; raise evaluation.client_sequences, or give --data FILE"
        )
    return found
