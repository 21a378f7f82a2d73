"""Whether a step runs to its end by the rules of the backend that carries its messages.

`validate` proves more of a plan where less is known of the transport. A GPU's communicators add rules of their own,
under which an order that is free of deadlock by rendezvous can still stop:

- What a rank issues to one communicator runs in the order in which it was issued, on one stream of the device; and each
  of it begins when the device has done what was issued to it before. A message goes when its send and its receive are
  both the first in their streams: there are no buffers. A receive that is posted early so stands before every later
  send of the same communicator.
- A communicator may be made by the first message on it. That blocks the host of the side that comes first, until the
  other side comes to its own first message there.

Everything that happens has then a fixed list of what must have happened before it, whatever the times: the host's
blocking points, the device's work, the messages. A step stops if and only if these lists go round in a circle. A rule
that adds to the lists can make a circle and undo none; so a step that runs under the strictest rules runs under every
milder one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_megatron.schedule.actions import Action
from dsv3_megatron.schedule.plan import Plan
from dsv3_megatron.schedule.timeline import PlanError
from dsv3_megatron.schedule.transfers import (
    MAX_UNFINISHED_SENDS,
    RECEIVE_AHEAD,
    Edge,
    Issued,
    Program,
    Send,
    Transfer,
    edges_of,
    issue_order,
    rounds_of_meetings,
)

__all__ = ["FIRST_CONTACT", "ONE_STREAM", "STRICTEST", "Delivery", "Meeting", "check_delivery", "own_communicator"]


@dataclass(frozen=True)
class Delivery:
    """Rules by which a backend carries messages between two ranks over a communicator.

    Attributes:
        name: Name of the rules, for messages.
        has_stream_per_pair: Messages of a communicator wait for one another only if they are between the same ranks.
        blocks_on_first_contact: The first message between two ranks on a communicator blocks the host until the other
            side is at its own first one.
        waits_for_device: The host waits behind each action until its device has nothing left to do, as a layer makes
            it that reads the sizes of its exchanges; otherwise it issues a whole step at once.
    """

    name: str
    has_stream_per_pair: bool = False
    blocks_on_first_contact: bool = False
    waits_for_device: bool = False


# torch 2.15's "nccl", by itself called nccl2: one communicator and one stream for a process group.
ONE_STREAM = Delivery("one stream for a communicator")
# "nccl" of torch 2.11 to 2.14, also with TORCH_DIST_USE_NCCL2=0: a communicator for each pair that sends and receives.
FIRST_CONTACT = Delivery("first contact", has_stream_per_pair=True, blocks_on_first_contact=True)
STRICTEST = Delivery("one stream, first contact, a host that waits", blocks_on_first_contact=True,
                     waits_for_device=True)


class Meeting(NamedTuple):
    """A message without content, with which two ranks make their communicator."""

    source: int
    destination: int

    def __str__(self) -> str:
        return f"first message from rank {self.source} to rank {self.destination}"


Message = Transfer | Meeting
# From where to where a message goes -> what its communicator is called.
Communicator = Callable[[int, int], Hashable]


def own_communicator(source: int, destination: int) -> Edge:
    """The communicator of a message where each edge has its own: what `transport` makes."""
    return source, destination


def check_delivery(plan: Plan, programs: Sequence[Program], delivery: Delivery = STRICTEST, *,
                   communicator: Communicator = own_communicator, meetings: Sequence[Edge] | None = None,
                   receive_ahead: int = RECEIVE_AHEAD) -> None:
    """Run a step of a plan, as the executor issues it, by the rules of a backend.

    Args:
        plan: A plan that is sound by `check_work`.
        programs: The plan's actions and exchanges by rank, sound by `check_rendezvous`.
        delivery: Rules of the backend.
        communicator: Names the communicator that carries what goes from one rank to another.
        meetings: Edges in the order in which ranks meet on them before the step; None: every edge of the placement, in
            the rounds of `rounds_of_meetings`, as the transport does it; empty: they do not meet.
        receive_ahead: Actions by which receives go before their place.

    Raises:
        PlanError: ranks wait for each other; the message has the whole circle.
    """
    if meetings is None:
        meetings = [edge for edges in rounds_of_meetings(edges_of(plan.placement)) for edge in edges]
    events = _Events(delivery, communicator)
    for rank, program in enumerate(programs):
        _Rank(events, plan, rank).run(meetings, issue_order(program, rank, receive_ahead))
    events.add_contacts()
    circle = events.circle()
    if circle:
        raise PlanError(f"deadlock by the rules of {delivery.name}: "
                        + ", which waits for ".join([*circle, "the former"]))


class _Events:
    """What happens in a step, and what must have happened before each."""

    def __init__(self, delivery: Delivery, communicator: Communicator) -> None:
        self.delivery, self.communicator = delivery, communicator
        self.labels: list[tuple[str, object]] = []
        self.before: list[list[int]] = []
        self._messages: dict[Message, int] = {}
        # The host's blocking point at a first message, and the event before it, by communicator, pair and rank.
        self._contacts: dict[Hashable, dict[int, tuple[int, int | None]]] = defaultdict(dict)

    def add(self, kind: str, what: object, *before: int | None) -> int:
        """An event; None stands for the beginning."""
        self.labels.append((kind, what))
        self.before.append([event for event in before if event is not None])
        return len(self.before) - 1

    def message(self, message: Message) -> int:
        """The event that a message goes, which both sides have."""
        if message not in self._messages:
            self._messages[message] = self.add("the {}", message)
        return self._messages[message]

    def contact(self, rank: int, message: Message, host: int | None) -> int | None:
        """The host's state at the issue of a message: blocked, where it is the first."""
        if not self.delivery.blocks_on_first_contact:
            return host
        pair = (self.communicator(message.source, message.destination), frozenset(message[:2]))
        sides = self._contacts[pair]
        if rank in sides:
            return host
        event = self.add(f"rank {rank}'s host at the {{}}", message, host)
        sides[rank] = event, host
        return event

    def add_contacts(self) -> None:
        """Let each side of a first contact wait until the other has come; called when all have been added."""
        for sides in self._contacts.values():
            for rank, (event, _) in sides.items():
                self.before[event] += [came for other, (_, came) in sides.items() if other != rank and came is not None]

    def circle(self) -> list[str]:
        """Events that wait for each other, in words; empty if everything happens."""
        after: list[list[int]] = [[] for _ in self.before]
        lacking = [len(own) for own in self.before]
        for event, own in enumerate(self.before):
            for earlier in own:
                after[earlier].append(event)
        ready = deque(event for event, number in enumerate(lacking) if not number)
        while ready:
            for event in after[ready.popleft()]:
                lacking[event] -= 1
                if not lacking[event]:
                    ready.append(event)
        stuck = next((event for event, number in enumerate(lacking) if number), None)
        path: list[int] = []
        while stuck is not None and stuck not in path:
            path.append(stuck)
            stuck = next(event for event in self.before[stuck] if lacking[event])
        return [kind.format(what) for kind, what in (
            self.labels[event] for event in path[path.index(stuck):])] if stuck is not None else []


class _Rank:
    """What one rank issues, turned into events."""

    def __init__(self, events: _Events, plan: Plan, rank: int) -> None:
        self.events, self.plan, self.rank = events, plan, rank
        self.host: int | None = None      # where the host was last blocked
        self.device: int | None = None    # what was issued last to the device's own stream
        self.streams: dict[Hashable, int] = {}
        self.unfinished: dict[int, deque[Message]] = defaultdict(deque)

    def run(self, meetings: Sequence[Edge], order: Sequence[Issued]) -> None:
        """Meet the others, then run a step."""
        for edge in meetings:
            if self.rank in edge:
                self.issue(Meeting(*edge))
                self.wait_for(Meeting(*edge))
        arrivals: dict[object, Transfer] = {}
        for item in order:
            if isinstance(item, Action):
                self.run_action(item, arrivals)
                continue
            self.issue(item.transfer)
            if isinstance(item, Send):
                unfinished = self.unfinished[item.transfer.destination]
                unfinished.append(item.transfer)
                if len(unfinished) > MAX_UNFINISHED_SENDS:
                    self.wait_for(unfinished.popleft())
            else:
                arrivals[item.transfer.output] = item.transfer
        for unfinished in self.unfinished.values():
            for message in unfinished:
                self.wait_for(message)

    def run_action(self, action: Action, arrivals: dict[object, Transfer]) -> None:
        operands = [self.plan.operand(self.rank, operation) for operation in action.operations]
        for operand in operands:
            if operand in arrivals:
                self.wait_for(arrivals.pop(operand))
        self.device = self.events.add(f"rank {self.rank} at {{}}", action, self.device, self.host)
        if self.events.delivery.waits_for_device:
            self.host = self.device

    def issue(self, message: Message) -> None:
        """Put a message into its stream, behind what is there and behind what the device has been given."""
        self.host = self.events.contact(self.rank, message, self.host)
        event = self.events.message(message)
        stream: Hashable = self.events.communicator(message.source, message.destination)
        if self.events.delivery.has_stream_per_pair:
            stream = stream, frozenset(message[:2])
        needs = (self.host, self.device, self.streams.get(stream))
        self.events.before[event] += [need for need in needs if need is not None]
        self.streams[stream] = event

    def wait_for(self, message: Message) -> None:
        """Let the device go on only when a message is there, or has been sent."""
        self.device = self.events.add(f"rank {self.rank} behind the {{}}", message, self.device, self.host,
                                      self.events.message(message))
