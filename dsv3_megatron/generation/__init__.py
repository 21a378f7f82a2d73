"""Text from a model: prefill, decoding with a cache, sampling, and the MTP module as a speculative decoder.

    cache.py          what is kept of a position: the latent (MLA's point), or whole keys and values to compare with
    decode.py         attention of new tokens to a cache, with the up-projections absorbed or not
    cached_layers.py  a layer over rows of tokens, from its modules' weights without their calls
    forward.py        the model over prompts and over new tokens
    sampling.py       logits -> distribution -> token
    speculative.py    the acceptance rule, and decoding one or two tokens at a time
    scoring.py        log-probabilities of answers that are there already
    generator.py      prompts in batches -> tokens, as they come
    continuations.py  log-probabilities of continuations of texts, many in one pass
    text.py           which tokenizer; prompts -> ids, ids -> text as it becomes whole
    stop_texts.py     sequences that end where their text has come to a given word

One process holds the whole model, whose weights may come from a checkpoint of any layout; or several do:

    split_layers.py   a layer of which each rank has a part
    split_model.py    stages, heads and experts on several ranks, run as if they were one model
"""
