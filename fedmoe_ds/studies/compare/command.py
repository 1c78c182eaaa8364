"""Command: a whole study from its request to its report; what `launch/compare.py` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmoe_ds.config import find_config, load_config
from fedmoe_ds.errors import EXIT_USER_ERROR, UserError
from fedmoe_ds.report import formats
from fedmoe_ds.report.history import tier_results
from fedmoe_ds.shell import command_line
from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.compare.plan import parse_variants, plan_runs
from fedmoe_ds.studies.compare.protocol import read_protocol
from fedmoe_ds.studies.compare.record import Record, aligned, check_same_ground, read_record
from fedmoe_ds.studies.compare.report import Study, results_text, write_report
from fedmoe_ds.studies.report_files import check_copy
from fedmoe_ds.studies.run import Run, check_saved
from fedmoe_ds.studies.runner import Outcome, Runner, locked


@dataclass(frozen=True)
class Request:
    """The command line. `methods` as in --methods; `overrides` are for every run; `report` is a second place for the text."""

    methods: str
    seeds: int
    config: Path
    study: Path
    output: Path
    jobs: int = 1
    ranks: int = 1
    overrides: Sequence[str] = ()
    report: Path | None = None


def compare(request: Request, script: Path, environment: Mapping[str, str], note: Callable[[str], None]) -> tuple[int, str]:
    """Run what is not finished, then write the report from what is there.

    Args:
        script: what trains a run.
        environment: of the runs.
        note: takes lines for the user: one per finished, failed or stopped run.
    Returns:
        The exit code (0; 1 when a run failed or is missing; 2 when all failures are the user's mistakes) and the text for
        standard output.

    Raises:
        UserError: bad input, or runs of one seed that turn out not to share foundation and data.
    """
    for name, value in (("--jobs", request.jobs), ("--ranks", request.ranks)):
        if value < 1:
            raise UserError(f"{name}: {value}: must be at least 1")
    study_file = find_config(request.study)
    protocol = read_protocol(study_file)
    variants = parse_variants(request.methods, protocol, study_file.parent / "methods")
    runs = plan_runs(request.config, variants, request.seeds, request.output, request.overrides, request.ranks)
    check_copy(request.report)
    with locked(request.output) as lock:
        check_saved(runs)
        # Here as well as after the runs: hours of training should not end in a refusal that could be foreseen.
        check_same_ground(_records(runs))
        outcome = Runner(script, environment, note, request.jobs, result=_perplexities).run(runs, lock)
        records = _records(runs)
        check_same_ground(records)
        study = Study(
            command=_command(request),
            base=str(request.config),
            base_config=load_config(request.config, request.overrides),
            variants=variants,
            overrides=request.overrides,
            runs=runs,
            comparison=Comparison([variant.label for variant in variants], request.seeds, records),
            expectations=protocol.expectations,
            reasons=outcome.reasons,
        )
        path = write_report(study, request.output, request.report)
    return exit_code(outcome, runs, len(records)), "\n\n".join(
        part for part in (results_text(study), f"report: {path}") if part
    )


def _records(runs: Sequence[Run]) -> list[Record]:
    return aligned([read_record(run) for run in runs if run.finished])


def exit_code(outcome: Outcome, runs: Sequence[Run], finished: int) -> int:
    """0 with every run finished, 2 when the user's mistakes are all that is in the way, else 1."""
    if finished == len(runs):
        return 0
    return EXIT_USER_ERROR if outcome.exit_code == EXIT_USER_ERROR else 1


def _perplexities(run: Run) -> str:
    """Those of a finished run on the global hold-out, by tier."""
    scores = [result for result in tier_results(run.history().evaluations.values()) if result.split == "global"]
    return "perplexity " + ", ".join(f"k={s.tier} {formats.score(s.after, 'perplexity', formats.number)}" for s in scores)


def _command(request: Request) -> str:
    """The command that repeats the study; where it writes and how many runs go on at once do not change a number."""
    words = ["python", "launch/compare.py", "--methods", request.methods, "--seeds", str(request.seeds)]
    words += ["--config", str(request.config), "--study", str(request.study)]
    words += ["--ranks", str(request.ranks)] if request.ranks > 1 else []
    return command_line([*words, *request.overrides])
