"""Predicted: what the planner says about a round of a run, for the column beside the measured one."""

from __future__ import annotations

from fedmoe_ds.config import Config
from fedmoe_ds.planner import Job, World, load_hardware, predict_job, resolve
from fedmoe_ds.studies.scaling.measured import Measured


class Predictor:
    """Predicts rounds on one kind of hardware: a calibration file or a name that the planner knows.

    Raises:
        UserError: it is neither.
    """

    def __init__(self, hardware: str) -> None:
        self.hardware = load_hardware(hardware)
        self._jobs: dict[str, Job] = {}

    def seconds(self, config: Config, measured: Measured) -> float | None:
        """Seconds of the `round` event, mean over the rounds that were timed, in the world that ran them.

        None where hosts held different numbers of ranks, which the planner does not know.
        """
        if measured.ranks % measured.hosts:
            return None
        # Repeats differ in their name alone and share one job: resolving it reads the data.
        key = config.model_dump_json(exclude={"name"})
        if key not in self._jobs:
            self._jobs[key] = resolve(config, kind=self.hardware.kind)
        job, world = self._jobs[key], World(measured.hosts, measured.ranks // measured.hosts)
        place = (config.topology.ep_size, config.execution.clients_in_flight, world, self.hardware)
        # Round by round: who takes part, and with how much data, differs between them.
        return sum(predict_job(job, *place, number).round_seconds for number in measured.rounds) / len(measured.rounds)
