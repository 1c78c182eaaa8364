"""Command: a whole study from its request to its report; what `launch/scaling.py` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe_ds.config import find_config
from fedmoe_ds.shell import command_line
from fedmoe_ds.studies.report_files import check_copy
from fedmoe_ds.studies.resources import check_capacity, in_allocation
from fedmoe_ds.studies.run import Run
from fedmoe_ds.studies.runner import Runner
from fedmoe_ds.studies.scaling.measured import measure, note_machine
from fedmoe_ds.studies.scaling.point import Point, check_folders, check_points, chosen, in_order, plan_points
from fedmoe_ds.studies.scaling.report import Results, results_text, write_report
from fedmoe_ds.studies.scaling.rows import Row, differing, with_efficiency
from fedmoe_ds.studies.scaling.study import Study, read_study

if TYPE_CHECKING:
    from fedmoe_ds.studies.scaling.predicted import Predictor

UNTIMED = "finished without a round that could be timed; remove its folder and run it again"


@dataclass(frozen=True)
class Request:
    """The command line. At most one of `points`, `point` and `collect` is set. `output` None is runs/scaling/<name>."""

    config: Path
    output: Path | None = None
    hardware: str | None = None
    report: Path | None = None
    points: bool = False
    point: int | None = None
    collect: bool = False
    overrides: Sequence[str] = ()


def scale(request: Request, script: Path, environment: Mapping[str, str], note: Callable[[str], None]) -> tuple[int, str]:
    """List the points, run one, collect what is there, or run everything and collect.

    Args:
        script: what trains a run.
        environment: of the ranks.
        note: takes lines for the user: one per finished, failed or stopped run.
    Returns:
        The exit code and the text for standard output.

    Raises:
        UserError: bad input, before any rank is started.
    """
    file = find_config(request.config)
    study = read_study(file)
    output = request.output or Path("runs") / "scaling" / study.name
    points = plan_points(study, file, output, request.overrides)
    if request.points:
        return 0, "\n".join(f"{point.index} {point.label} {point.ranks}" for point in points)
    check_copy(request.report)
    mine = chosen(points, request.point)
    check_folders(mine)
    predictor = _predictor(request)
    failed: Mapping[str, str] = {}
    code = 0
    if not request.collect:
        code, failed = _run(study, mine, script, environment, note)
    if request.point is not None:
        return code, ""
    results = _collect(request, study, points, failed, predictor)
    path = write_report(results, output, request.report)
    if code == 0 and (results.missing or differing(results.rows)):
        code = 1
    return code, f"{results_text(results)}\n\nreport: {path}"


def _run(
    study: Study, points: Sequence[Point], script: Path, environment: Mapping[str, str], note: Callable[[str], None]
) -> tuple[int, Mapping[str, str]]:
    waiting = [point for point in points if not point.finished]
    for point in waiting:
        check_capacity(point.label, point.ranks, environment)
    check_points(waiting)

    def prepare(run: Run) -> None:
        note_machine(run, environment)

    # One group of ranks at a time: two would take each other's cores, and the figures would be theirs. No lock of the study:
    # the tasks of a SLURM array work on its points side by side.
    runner = Runner(script, environment, note, jobs=1, by_slurm=in_allocation(environment), prepare=prepare)
    outcome = runner.run(in_order(study, points))
    return outcome.exit_code, outcome.reasons


def _predictor(request: Request) -> Predictor | None:
    if request.hardware is None:
        return None
    from fedmoe_ds.studies.scaling.predicted import Predictor  # brings the planner and with it the models

    return Predictor(request.hardware)


def _collect(
    request: Request, study: Study, points: Sequence[Point], failed: Mapping[str, str], predictor: Predictor | None
) -> Results:
    rows, missing = [], {}
    for point, run in ((place, run) for place in points for run in place.runs):
        measured = measure(run) if run.finished else None
        if measured is None or not measured.rounds:
            missing[run.name] = failed.get(run.name, "not finished") if measured is None else UNTIMED
            continue
        predicted = None if predictor is None else predictor.seconds(run.config, measured)
        rows.append(Row(point.value, point.label, run.seed, run.config, measured, predicted=predicted))
    hardware = None if request.hardware is None else Path(request.hardware).name
    return Results(study, _command(request), with_efficiency(study, rows), missing, hardware)


def _command(request: Request) -> str:
    """The command that repeats the study."""
    words = ["python", "launch/scaling.py", "--config", str(request.config)]
    words += ["--hardware", request.hardware] if request.hardware is not None else []
    return command_line([*words, *request.overrides])
