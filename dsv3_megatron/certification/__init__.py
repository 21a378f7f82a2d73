"""A certificate that a layout computes what one process computes, and that one process computes what is defined.

In reading order:

    certify.py              layouts and one process, in turns, and their verdicts
    shrunk_run.py           the small run that stands for a large one, and what that does not prove
    certified_layout.py     what the processes of a layout do: two steps, two resumes
    rank_step.py            what one rank holds of a step
    rank_forks.py           processes forked from one that has imported everything
    random_samples.py       the tokens

    verdict.py              what is compared with what
    comparison.py           two steps, number by number
    routing_notes.py        what routers saw and chose, and which differences are ties
    given_roundings.py      roundings to FP8 that the order of a sum decides
    certificate.py          the verdict as text and JSON

    reference.py            the model in plain torch, from the report; nothing of this library
    reference_weights.py    its architecture, weights and their random values
    document_step.py        a global batch by definition: the reference on every document
    defined_steps.py        optimizer steps by definition
    defined_update.py       AdamW by definition, given gradients
    weight_names.py         the reference's weights in our modules

    random_layouts.py       layouts at random, as flags
"""
