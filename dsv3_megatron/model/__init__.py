"""The model: one pipeline stage's modules, out of this library's own and Megatron-Core's, and what runs them.

In reading order. From a configuration to modules:

    build.py  a run -> this rank's stages, wrapped  mcore_config.py    settings, for Megatron-Core
    specs.py  the tree of modules                   language_model.py  a stage, and its losses if last

The parts of a layer:

    attention.py         multi-head latent attention       rotary.py   positions
    router.py            which experts, with which gates   experts.py  routed, shared and dense FFN
    token_dispatcher.py  tokens to their experts and back  mtp.py      multi-token prediction
    node_dispatcher.py   the same, once for each node
    linear.py            linears, split and whole          norm.py     RMSNorm
    packed_documents.py  packed documents kept apart       losses.py   token losses -> a step's sums
    shared_beginnings.py  documents that go on from one

What all of it is set to:

    global_names.py  global names of parameters          init.py                initial weights
    fp8_modules.py   the precision map put into modules  recomputed_modules.py  what is computed again
    steady_modules.py  which sums have generation's bits
    observation.py   what routers and heads note when logged

A stage in pieces, for schedules that hide transfers or let weight gradients wait, is in stage/.
"""
