"""What a run is asked to be: dataclasses whose fields are its flags, and every rule that a setting must keep. No torch.

In reading order; a wrong setting raises `fields.ConfigError` before anything is allocated:

    fields.py        how a field is declared; ConfigError      values.py        a given value -> a field's value
    router_functions.py  affinities and balance losses by name
    model.py         architecture                              weights.py       a row for every weight of it
    precision.py     FP8, product by product                   data.py          what is read
    step.py          what a step takes: batch, rate, weights   training.py      length, optimizer, checkpoints, logs
    memory.py        what trades memory for arithmetic
    pipeline.py      names and sizes of schedules              parallel.py      how a run is split, and whether it fits
    expert_dispatch.py   ways of tokens to their experts
    guards.py        what is done about bad steps              run.py           RunConfig: all of these together
    presets.py       named runs                                files.py         TOML, YAML, JSON -> plain values
    family_json.py   config.json of a model -> ModelConfig   rotary_settings.py   its rotary settings
    json_numbers.py  its numbers
    load.py          command line and file -> RunConfig    world_size.py    processes at hand that a run can use
    fine_tuning.py   settings of a fine-tuning             policy.py        GRPO: prompts, rewards, rollouts
    sweep_file.py    settings x seeds of such runs

A run whose settings change under way:

    phases.py        phases as they are written                ramps.py         learning rate and batch at a position
    recipe.py        every step of a run, laid out             past.py          steps that another recipe planned
    launches.py      phases of one layout, in one start

Megatron-LM's flags:

    megatron_flags.py    the table of them                     megatron_values.py   flags -> fields
    megatron_docs.py     the table as a page

What all commands share:

    output.py        JSON and output files                     streams.py       stdout and stderr that may be gone
    json_files.py    JSON of others, within bounds     new_files.py     files that get their name all at once
    slow_work.py     a bar for what takes longer than three seconds
    packages.py      whether a package is installed    version.py       the library's version
"""
