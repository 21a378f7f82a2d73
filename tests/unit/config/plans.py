"""Runs whose steps are planned."""

from __future__ import annotations

from dsv3_megatron.config.recipe import Recipe, StepPlan


def walk(recipe: Recipe) -> list[tuple[int, int, StepPlan]]:
    """Every step, one after the other, as a trainer takes them."""
    steps: list[tuple[int, int, StepPlan]] = []
    iteration = tokens = 0
    while (plan := recipe.step(iteration, tokens)) is not None:
        steps.append((iteration, tokens, plan))
        iteration, tokens = iteration + 1, tokens + plan.num_tokens
    return steps
