"""Messages: what ranks and rank 0 send to each other over a `JsonSocket`, and the check of what was heard.

Nothing of a message is used before it has been checked: a wrong type ends in a `GarbledError`, which says what is wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from fedmoe_ds.distributed.watchdog.json_socket import GarbledError

Hex: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""256 bits: a nonce or a proof."""
# os._exit takes a C int and raises for more.
Code: TypeAlias = Annotated[int, Field(ge=-(2**31), lt=2**31)]
T = TypeVar("T")


class Message(BaseModel):
    """Strict: `true` is no number, `"1"` neither, and an unknown key is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Challenge(Message):
    """Rank 0's first message on a new connection."""

    challenge: Hex


class Hello(Message):
    """Which rank connects, a challenge in return, and the answer to rank 0's."""

    hello: int
    challenge: Hex
    proof: Hex


class Welcome(Message):
    """Rank 0's answer to the challenge."""

    welcome: Hex


class State(Message):
    """What a process is doing (`activity.Activity.state`)."""

    round: int
    phase: str
    waiting: str | None
    for_s: float
    groups: list[str]


class Alive(Message):
    """A heartbeat."""

    alive: State


class Bye(Message):
    """The process ends with this code. `text` says why, for rank 0 to repeat."""

    bye: Code
    text: str = ""


class Over(Message):
    """Rank 0 ends the job with this code. Ranks in `kill` are silent; whoever shares a host with one kills it."""

    over: Code
    kill: list[int] = []


Said: TypeAlias = Alive | Bye
"""By a rank that rank 0 knows."""
Told: TypeAlias = Alive | Bye | Over
"""By rank 0."""
said: TypeAdapter[Said] = TypeAdapter(Said)
told: TypeAdapter[Told] = TypeAdapter(Told)
challenge: TypeAdapter[Challenge] = TypeAdapter(Challenge)
hello: TypeAdapter[Hello] = TypeAdapter(Hello)
welcome: TypeAdapter[Welcome] = TypeAdapter(Welcome)


def check(kind: TypeAdapter[T], message: dict[str, Any]) -> T:
    """The message as one of `kind`.

    Raises:
        GarbledError: it is none.
    """
    try:
        return kind.validate_python(message)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Keys come from the message: only those that are names are repeated, and the values never.
        where = ".".join(part for part in map(str, first["loc"]) if part.isascii() and part.isalnum() and len(part) < 20)
        raise GarbledError(f"a message with a wrong {where or 'key'}: {first['msg']}") from None
