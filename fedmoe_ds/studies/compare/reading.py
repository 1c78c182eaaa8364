"""Reading: what a reader must know before the figures of a study: how far it reaches, and how its claims were tested."""

from __future__ import annotations

from collections.abc import Sequence

from fedmoe_ds.config import Config
from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.compare.paired import ALPHA, smallest_effect
from fedmoe_ds.studies.compare.record import Record
from fedmoe_ds.studies.compare.verdict import EQUAL_FLOPS, Verdict

COLUMNS = """\
A tier names the FLOPs of top-k active experts per token; each method spends them as it does, and is evaluated as its clients
of that tier train: with k active experts, or with all of them and a smaller rank. Perplexity and accuracy are next-token
figures on the global hold-out after the last round; clients' hold-outs are the perplexity on what the clients held back,
pooled. A figure is mean ± sample standard deviation over seeds. A seed changes the data, and a foundation that is pre-trained
here, as well, so this spread is mostly the difference between tasks; methods are told apart by pairs of runs with the same
seed. TFLOP: forward and backward operations of one client in one round, averaged over the clients of the tier."""

WITHOUT_EXPERTS = """\
Plain LoRA on a dense foundation has no experts, so nothing to divide among tiers: beside methods with a single tier it stands
there, with all that it trains."""

COUNTED = """\
FLOPs follow from k, rank and shapes. That these orderings hold is arithmetic, which no training could have refuted: they are no
results, and no test is made of them."""

TASKS = """\
Task metrics are shares of hold-out samples that are answered right, before (the foundation) and after the last round: mean ±
half of the 95 % t-interval over seeds, that of the change over the seeds' own changes. Exact match: greedy decoding gives the
reference answer, token by token. Ranked choice: of all answers in the data the right one is the likeliest."""

FAIRNESS = """\
Accuracy over clients, every client's own hold-out being one value, after the last round: mean ± half of the 95 % t-interval
over seeds. Worst tenth: the mean over the tenth of the clients, rounded up, for which the model does worst. Spread: the
standard deviation over clients. Orderings of these are tested by differences in points, and not of logarithms."""

EQUAL = (
    "The last column has the FLOPs of the left side in those of the right one, *equal* where they agree within "
    f"{100 * EQUAL_FLOPS:g} % in every seed; no other ordering is one at equal FLOPs."
)


def caveat(config: Config, seeds: int) -> str:
    """How far a study reaches, before its first figure."""
    size = f"{config.data.partition.clients} clients, " if config.data.partition.clients else ""
    size += f"{config.federation.rounds} rounds of {steps(config)}, the model {model(config)}, {_count(seeds, 'seed')}"
    return (
        f"**How far this reaches.** {size}: what follows is about this model, these data and this little training. It says "
        "nothing about models of billions of parameters, other data, more clients or longer training; orderings may be others "
        "there."
    )


def model(config: Config) -> str:
    """What is fine-tuned."""
    return str(config.foundation.path or config.foundation.preset)


def steps(config: Config) -> str:
    """How much a client trains in a round."""
    count = config.local.steps or (f"at most {config.local.max_steps}" if config.local.max_steps else None)
    return f"{count} local steps" if count else f"{config.local.epochs:g} local epochs"


def holdouts(config: Config, records: Sequence[Record]) -> str:
    """That hold-outs are samples, and how large they were: targets over the seeds; empty where no run says so."""
    found: dict[str, set[int]] = {}
    for record in records:
        for key, tokens in record.ground["hold-outs"].items():
            if tokens is not None:
                found.setdefault(str(key).partition(" ")[0], set()).add(int(tokens))
    if not found:
        return ""
    limits = config.evaluation
    most = "" if limits.max_sequences is None else f" (at most {limits.max_sequences} sequences)"
    caps = {"global": most, "clients": f" (at most {limits.client_sequences} sequences of every client)"}
    names = {"global": "the global one", "clients": "those of the clients together"}
    sizes = ", ".join(f"{names[split]} {_reach(tokens)} targets{caps[split]}" for split, tokens in found.items())
    return (
        f"Hold-outs are samples: {sizes}. Another sample of this size gives other figures. The methods of a seed are measured "
        "on the same one and seeds on different ones, so that this error is part of the spread over seeds that the tests see."
    )


def _reach(numbers: set[int]) -> str:
    return f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def tests(comparison: Comparison, verdicts: Sequence[Verdict]) -> str:
    """Which test, which families, which correction, and what so many seeds can decide."""
    seeds, methods = comparison.seeds, len(comparison.labels)
    if seeds < 2:
        return "With a single seed there is no spread and no test: nothing is decided."
    pairs, orderings = methods * (methods - 1) // 2, sum(verdict.test is not None for verdict in verdicts)
    families = {f"{_count(pairs, 'pair')} of methods at a tier, by figure": pairs}
    families[_count(orderings, "published ordering")] = orderings
    families = {name: size for name, size in families.items() if size}
    if not families:
        return "There is nothing to compare."
    named, effects = ", and the ".join(families), " and ".join(f"{smallest_effect(seeds, n):.1f}" for n in families.values())
    return (
        "Two methods are told apart by a two-sided paired t-test of log(left / right) over seeds; p-values are corrected by "
        f"Holm within a family: the {named}. `a < b` and a verdict say that the corrected p is below {ALPHA:g}. `a ≈ b` and "
        f"*not decided* say that it is not, which is no evidence of equality. With {seeds} seeds, the first claim of a family "
        f"is decided where its mean difference is at least {effects} times the standard deviation over seeds. (A permutation "
        "test of the signs, which does not assume normal differences, could not fall below p = "
        f"{2.0 ** (1 - seeds):.2g} before the correction.) Bold is what no other method is decided to be better than, where "
        "anything is decided."
    )
