"""What belongs to a client or a rank is on its device, and what a run says of the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from federations import build, finish
from method_variants import variant_config
from test_methods_algebra import make_pair, method

from fake_cuda.runs import on_device, root, run_on_device

SHORT: dict[str, Any] = {
    "execution": {"reproducible": "auto", "clients_in_flight": 4},
    "federation": {"rounds": 1},
    "local": {"steps": 1},
}
SCORED: dict[str, Any] = {"evaluation": {"client_sequences": 1, "every": 1}}


def case_control_variates_where_dense_blocks_are_alone(fake: Any) -> None:
    """Ranks of low rank hold some of the rows, so the client's state is cut on the device."""
    run_on_device(variant_config(root(), "scaffold-rows", "device", SHORT))


def case_personal_models_are_scored_and_survive_a_resume(fake: Any) -> None:
    config = variant_config(root(), "local-only", "resumed", SHORT, SCORED)
    run_on_device(config)
    more = variant_config(root(), "local-only", "resumed", SHORT, SCORED, {"federation": {"rounds": 2}})
    parts, journal = build(more, *on_device())
    assert every_value_on_the_host(parts)
    result = finish(parts, journal)
    assert [event for event in result.events if event["event"] == "eval" and "client" in event]


def case_steps_of_a_server_do_not_wait(fake: Any) -> None:
    """LoRA-FAIR takes fifty for each adapter."""
    pair = make_pair(3, 4, (10, 12))
    on_it = replace(pair, **{name: getattr(pair, name).to(fake.device) for name in ("a_PRI", "b_POR", "weight_P")})
    fair = method("lora-fair")
    expected = fair.combine(pair, pair.a_PRI[0])
    fake.COUNT.reset()
    found = fair.combine(on_it, on_it.a_PRI[0])
    assert fake.COUNT.total_waits == 0 and fake.COUNT.kernels <= 42 * fair.params.server_steps, fake.COUNT.summary("combine")
    assert found.b_OR.cpu().equal(expected.b_OR)


def every_value_on_the_host(parts: Any) -> bool:
    """Memory of all clients would not fit on a device: theirs go there with the wave that trains them."""
    values = list(parts.state.personal.state(0).values())
    return bool(values) and not [value for value in values if value.device.type != "cpu"]
