"""What routers saw and chose, noted in one run and taken by another, and which differences are ties.

A router chooses. Where two experts score alike within rounding, the order of fp32 sums decides, which differs between
layouts, schedules, numbers of threads and CPUs. A token that goes elsewhere changes later losses by far more than
rounding, so that two sound runs part at the first tie. Here one run notes what its routers see and choose, token by
token; another takes those choices in place of its own and notes the same, its own choices too. `compare_notes` then
holds one against the other:

- every token that the first run routed was routed by the second, with the same balancing bias to the bit;
- all affinities agree within what is said that rounding does to them;
- each run chose the best by its own affinities, and where the choices differ, the margin between the experts or groups
  in question is at most twice what rounding did to this very token's affinities: a tie.

What else is compared stays comparable within rounding to the last step, and nothing there has to be loosened. The
experts that tokens go to and those that the balance loss counts are treated alike.

Shapes: S positions of a call, B micro-batch, E experts, K experts a token, T tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

# A tie of exact arithmetic may be decided by fp32's rounding of a score plus a bias, and of sums of a few of these:
# values below 4, in units of 2^-22.
FP32_SUMS = 4 * 2.0**-22


@dataclass(frozen=True)
class ChoiceKind:
    """How a router chooses.

    Attributes:
        top_k: Experts a token.
        num_groups: Groups of experts.
        group_top_k: Groups a token may go to.
        group_score_topk: Experts, a group's best, whose scores are its score.
    """

    top_k: int
    num_groups: int = 1
    group_top_k: int = 1
    group_score_topk: int = 1


@dataclass
class Choices:
    """One router's choices of one kind in one pass over the data, by sample and position.

    Attributes:
        kind: Way in which they are made.
        bias_E: fp32, added to the affinities; zeros for the balance loss.
        scores: fp32 [E] of a token, by (sample, position).
        ids: int64 [K] likewise: the router's own choice.
    """

    kind: ChoiceKind
    bias_E: torch.Tensor
    scores: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    ids: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Pack the many small tensors into two, which a file takes a hundred times faster."""
        places = list(self.ids)
        assert places == list(self.scores), "what was chosen was seen"
        packed = [torch.stack(list(values.values())) if places else None for values in (self.scores, self.ids)]
        return {"kind": self.kind, "bias_E": self.bias_E, "places": places, "packed": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.kind, self.bias_E = state["kind"], state["bias_E"]
        self.scores, self.ids = (dict(zip(state["places"], values, strict=True)) if state["places"] else {}
                                 for values in state["packed"])


# By (pass, router).
Notes = dict[tuple[str, str], Choices]


def margin(biased_E: list[float], chosen: set[int], kind: ChoiceKind) -> float:
    """How much better than a choice another one is: 0 or less for a best choice.

    It is the largest of two gaps: from the worst expert chosen to the best one not chosen of the groups kept, and from
    the worst group kept to the best one dropped, for each of the scores summed to a group's. Where the chosen experts
    leave open which groups were kept, those with the smallest margin were. A choice that is best for scores which each
    differ from these by d at most has a margin of 2 d at most.
    """
    size = len(biased_E) // kind.num_groups
    members = [range(group * size, (group + 1) * size) for group in range(kind.num_groups)]
    best = kind.group_score_topk
    group_scores = [sum(sorted((biased_E[e] for e in group), reverse=True)[:best]) for group in members]
    used = {expert // size for expert in chosen}
    smallest = float("inf")
    for kept in itertools.combinations(range(kind.num_groups), kind.group_top_k):
        if not used <= set(kept):
            continue
        gaps = [-float("inf")]
        left = [biased_E[expert] for group in kept for expert in members[group] if expert not in chosen]
        if left:
            gaps.append(max(left) - min(biased_E[expert] for expert in chosen))
        dropped = [score for group, score in enumerate(group_scores) if group not in kept]
        if dropped:
            gaps.append((max(dropped) - min(group_scores[group] for group in kept)) / best)
        smallest = min(smallest, max(gaps))
    return smallest


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a module, a class or an object another value until the end of the block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class RoutingWatch:
    """Notes of this process's routers, and choices for them from another run's.

    Args:
        given: Choices to take in place of the routers' own, of all ranks of another run; none: their own. Where
            `given` has no such token, a router's own choice stands.

    Attributes:
        notes: What has been seen.
    """

    def __init__(self, given: Notes | None = None) -> None:
        self.given: Notes = given or {}
        self.notes: Notes = {}
        self._pass = ""
        # By router: samples of the micro-batches that came, and how many of them it has seen without and with
        # gradients; where a layer is computed again in backward, the second time has them.
        self._samples: dict[Any, list[list[int]]] = {}
        self._seen: dict[tuple[Any, bool], int] = {}
        # Where the choice for the balance loss belongs: samples and positions of the last call of its router.
        self._last: dict[Any, tuple[list[int], list[int]]] = {}

    def begin(self, pass_name: str) -> None:
        """Another pass over data begins: a step, or a validation."""
        self._pass = pass_name
        self._samples.clear()
        self._seen.clear()

    @contextlib.contextmanager
    def watched(self) -> Iterator[RoutingWatch]:
        """Routers and micro-batches are noted, and choices are taken, until the end of the block."""
        from dsv3_megatron.model.router import DeepSeekRouter
        from dsv3_megatron.schedule.forward_backward import ForwardStep

        own_experts, own_unbiased = DeepSeekRouter.best_experts, DeepSeekRouter.best_unbiased
        own_call, own_chunk = ForwardStep.__call__, ForwardStep.chunk

        def noting(step: ForwardStep, stage: torch.nn.Module) -> ForwardStep:
            found = [module for module in stage.modules() if isinstance(module, DeepSeekRouter)]

            def read(batches: Any) -> Any:
                batch = step.read(batches)
                for router in found:
                    self._samples.setdefault(router, []).append(batch.sample_ids_B.tolist())
                return batch

            return dataclasses.replace(step, read=read)

        with contextlib.ExitStack() as stack:
            for owner, name, replacement in (
                    (DeepSeekRouter, "best_experts", lambda router, scores_TE: self._experts(
                        router, scores_TE, partial(own_experts, router))),
                    (DeepSeekRouter, "best_unbiased", lambda router, scores_SBE: self._unbiased(
                        router, scores_SBE, partial(own_unbiased, router))),
                    (ForwardStep, "__call__", lambda step, batches, stage: own_call(
                        noting(step, stage), batches, stage)),
                    (ForwardStep, "chunk", lambda step, stage, batches: own_chunk(
                        noting(step, stage), stage, batches))):
                stack.enter_context(replaced(owner, name, replacement))
            yield self

    def _experts(self, router: Any, scores_TE: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor]
                 ) -> torch.Tensor:
        number = self._seen.get((router, torch.is_grad_enabled()), 0)
        self._seen[router, torch.is_grad_enabled()] = number + 1
        samples = self._samples[router][number]
        length = len(scores_TE) // len(samples)
        tensor_rank, tensor_ranks = ((router.tp_group.rank(), router.tp_group.size())
                                     if router.config.sequence_parallel else (0, 1))
        positions = router.parts.positions(length * tensor_ranks * router.parts.size).tolist()
        self._last[router] = samples, positions[tensor_rank * length : (tensor_rank + 1) * length]
        config, options = router.config, router.options
        assert options.group_mask == "exclude", "margins are those of groups that are kept out"
        kept = config.moe_router_group_topk or 1
        kind = ChoiceKind(config.moe_router_topk, config.moe_router_num_groups or 1, kept,
                    options.group_score_topk or max(1, config.moe_router_topk // kept))
        ids_TK = choose(scores_TE)
        shape = (length, len(samples))
        return self._note(router, "experts", kind, router.expert_bias, scores_TE.unflatten(0, shape),
                          ids_TK.unflatten(0, shape)).flatten(0, 1)

    def _unbiased(self, router: Any, scores_SBE: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor]
                  ) -> torch.Tensor:
        return self._note(router, "balance", ChoiceKind(router.config.moe_router_topk),
                          torch.zeros_like(router.expert_bias), scores_SBE, choose(scores_SBE))

    def _note(self, router: Any, what: str, kind: ChoiceKind, bias_E: torch.Tensor, scores_SBE: torch.Tensor,
              ids_SBK: torch.Tensor) -> torch.Tensor:
        """The choices to take."""
        samples, positions = self._last[router]
        depth = "MTP " if router.is_mtp_layer else ""
        key = self._pass, f"{what} of {depth}layer {router.layer_number}"
        noted = self.notes.setdefault(key, Choices(kind, bias_E.float().cpu().clone()))
        given = self.given.get(key)
        taken_SBK = ids_SBK.clone()
        for row, sample in enumerate(samples):
            for index in range(len(ids_SBK)):
                place, scores_E, ids_K = (sample, positions[index]), scores_SBE[index, row], ids_SBK[index, row]
                noted.scores[place], noted.ids[place] = scores_E.detach().float().cpu().clone(), ids_K.cpu().clone()
                # The order among equals is the router's own where the experts are.
                if given is not None and place in given.ids and set(ids_K.tolist()) != set(given.ids[place].tolist()):
                    taken_SBK[index, row] = given.ids[place].to(ids_K.device)
        return taken_SBK


def merge_notes(ranks: list[Notes]) -> Notes:
    """The notes of all ranks of a run as one."""
    merged: Notes = {}
    for notes in ranks:
        for key, choices in notes.items():
            whole = merged.setdefault(key, Choices(choices.kind, choices.bias_E))
            assert torch.equal(whole.bias_E, choices.bias_E), f"{key}: ranks have different biases"
            whole.scores |= choices.scores
            whole.ids |= choices.ids
    return merged


@dataclass(frozen=True)
class Tie:
    """A token that two runs sent to other experts, by a margin that rounding explains.

    Attributes:
        name: Pass and router, such as "step 1, experts of layer 3".
        place: Sample, and position in it.
        expected: Experts of the first run.
        chosen: Experts that the second would have chosen.
        margin: Distance of the scores that decided.
        allowed: Bound of the margin: what rounding explains.
    """

    name: str
    place: tuple[int, int]
    expected: tuple[int, ...]
    chosen: tuple[int, ...]
    margin: float
    allowed: float

    def __str__(self) -> str:
        return (f"{self.name}: sample {self.place[0]}, position {self.place[1]} would go to experts "
                f"{list(self.chosen)} instead of {list(self.expected)}, by a margin of {self.margin:.2g} where "
                f"rounding explains {self.allowed:.2g}")


@dataclass
class RoutingComparison:
    """What two runs' notes say of each other.

    Attributes:
        faults: Differences that rounding does not explain, the first first.
        ties: Differences that it explains.
        largest: Largest difference of two affinities.
    """

    faults: list[str] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    largest: float = 0.0


def compare_notes(expected: Notes, found: Notes, *, rounding: float, common_steps: int = 0) -> RoutingComparison:
    """Compare the routing of a run that took another's choices with that other's.

    Args:
        expected: Notes of the first run, all ranks; passes that the second had no part in are left out by the caller.
        found: Notes of the second.
        rounding: Distance that the affinities of a token, in 0..1, may have in the first step of which the sums differ
            in order; twice as far in the second, and so on: every update adds to it.
        common_steps: Steps of the first run that the second goes on from.
    """
    result = RoutingComparison()
    for key, choices in expected.items():
        name, other = ", ".join(key), found.get(key)
        if other is None:
            result.faults.append(f"{name}: nothing noted in the second run")
            continue
        wrong = _unlike(choices, other)
        if wrong:
            result.faults.append(f"{name}: {wrong}")
            continue
        _compare_choices(name, choices, other, rounding * (step_of(key[0]) - common_steps), result)
    return result


def _unlike(choices: Choices, other: Choices) -> str:
    """What makes two routers' notes be of different routers or tokens; "" if nothing does."""
    if other.kind != choices.kind:
        return f"{other.kind} instead of {choices.kind}"
    if not torch.equal(other.bias_E, choices.bias_E):
        return "the balancing bias differs"
    missing = choices.ids.keys() - other.ids.keys()
    if missing:
        return f"samples and positions {sorted(missing)[:5]} were not routed in the second run"
    return ""


def _compare_choices(name: str, choices: Choices, other: Choices, limit: float, result: RoutingComparison) -> None:
    places = list(choices.ids)
    scores_TE, others_TE = (torch.stack([part.scores[place] for place in places]) for part in (choices, other))
    apart_T = (others_TE.double() - scores_TE.double()).abs().amax(-1)
    worst = int(apart_T.argmax())
    result.largest = max(result.largest, float(apart_T[worst]))
    if not apart_T[worst] <= limit:
        result.faults.append(f"{name}: an affinity of sample and position {places[worst]} differs by "
                             f"{apart_T[worst]:.3g}, more than rounding's {limit:.3g}")
    bias_E = choices.bias_E.double()
    for place, scores_E, others_E, apart in zip(places, scores_TE, others_TE, apart_T.tolist(), strict=True):
        ours, theirs = set(other.ids[place].tolist()), set(choices.ids[place].tolist())
        if ours == theirs:
            continue
        gaps = [(margin((scores.double() + bias_E).tolist(), experts, choices.kind), allowed + FP32_SUMS)
                for experts, scores, allowed in ((theirs, scores_E, 0.0), (ours, others_E, 0.0),
                                                 (theirs, others_E, 2 * apart))]
        wrong = [(gap, allowed) for gap, allowed in gaps if not gap <= allowed]
        if wrong:
            result.faults.append(
                f"{name}: sample and position {place} went to experts {sorted(ours)} instead of {sorted(theirs)} by a "
                f"margin of {wrong[0][0]:.3g}, and rounding explains {wrong[0][1]:.3g}")
        else:
            result.ties.append(Tie(name, place, tuple(sorted(theirs)), tuple(sorted(ours)), *gaps[-1]))


def step_of(pass_name: str) -> int:
    """The step that a pass's name ends with: of a step, or of what is evaluated after it."""
    return int(pass_name.split()[-1])


def in_steps(notes: Notes, steps: range) -> Notes:
    """The notes of some steps and of what was evaluated after them."""
    return {key: choices for key, choices in notes.items() if step_of(key[0]) in steps}
