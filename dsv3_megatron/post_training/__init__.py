"""A model that learns from answers of its own: GRPO. Nothing is imported here.

In reading order:

    rewards.py      what an answer is worth: rules, functions of the user's, their time limit
    rollout.py      answers with their log-probabilities and rewards, and their advantages
    kept.py         rollouts on disk, as Parquet
    sampler.py      answers generated with the weights of the time
    objective.py    the loss: clipped ratios and the divergence from a reference
    answer_rows.py  answers packed into the sequences of a step, prompts shared
    frozen_reference.py  the frozen weights that the divergence is from
    checks.py       what is checked before a run starts
    policy_trainer.py  the training loop: `runs/trainer.py`'s, whose steps begin with rollouts

Source: DeepSeek-V3 report, section 5.2.2; Shao et al., DeepSeekMath (arXiv 2402.03300), section 4.1.
"""
