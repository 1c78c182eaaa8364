"""Setting: what a simulation takes for granted where neither configuration nor hardware say it."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe_ds.errors import UserError

MTBF_HOURS = 6300.0
"""Hours between failures of one host of eight GPUs: 419 unexpected interruptions of 16 384 GPUs in 54 days (The Llama 3 Herd of
Models, 2024, section 3.3.4) are 54 x 24 x 2 048 / 419 = 6 334 hours of a host, rounded. The three figures and eight GPUs to a
server were checked against reports about the paper."""


@dataclass(frozen=True)
class Setting:
    """Assumptions of a simulation.

    Attributes:
        clients: of the federation; None: `data.partition.clients`.
        participants: of a round; None: as the configuration's participation says.
        samples: mean number of sequences (or images) of a client.
        sigma: of the logarithm of that number, which is normal (lognormal sizes); 0: all clients are equal.
        mtbf_hours: mean time between failures of one host.
        storage_gb_per_s: what all ranks together write to, or read from, the shared file system.
        restart_minutes: from a failure to a process that reads weights: noticed, queued again, launched, imported.
        sampled: rounds that are drawn, scheduled and predicted.
    """

    clients: int | None = None
    participants: int | None = None
    samples: float = 100.0
    sigma: float = 1.0
    mtbf_hours: float = MTBF_HOURS
    storage_gb_per_s: float = 10.0
    restart_minutes: float = 10.0
    sampled: int = 3

    def __post_init__(self) -> None:
        for name in ("clients", "participants", "samples", "sampled"):
            value = getattr(self, name)
            # Infinite and not-a-number fail a comparison, too.
            if value is not None and not 1 <= value < 1e12:
                raise UserError(f"--{name}: {value}: must be 1 or more")
        for name, least in (("mtbf_hours", 0.01), ("storage_gb_per_s", 1e-6), ("restart_minutes", 0.0)):
            value = getattr(self, name)
            if not least <= value < 1e12:
                raise UserError(f"--{name.replace('_', '-')}: {value}: must be {least:g} or more")
        if not 0.0 <= self.sigma <= 3.0:
            raise UserError(f"--sigma: {self.sigma}: must lie between 0 (equal clients) and 3")

    @property
    def storage_bytes_per_s(self) -> float:
        return self.storage_gb_per_s * 1e9
