"""Text to tokens on disk, and tokens on disk to batches.

Nothing is imported here, so that preprocessing does not pay for torch: import the module that is needed.

    corpus.py      files -> Document; the quickstart's corpus    tokenizer.py   byte-level BPE like DeepSeek-V3's
    encoder.py     texts -> ids, the seam for backends           indexed.py     .bin/.idx and their sidecar
    preprocess.py  the three above in a row                      blend.py       --data-path, and checks before a run
    datasets.py    .bin/.idx -> samples, with Megatron-Core      batches.py     samples -> Batch, with a position
    ngram.py       unigram and bigram baselines                  fim.py         fill-in-the-middle on documents
    sentences.py   documents -> sentences with Punkt             combined_tokens.py  punctuation + line breaks, split
    keyed_random.py  random numbers of a document                text_sample.py  a bounded sample of a corpus
"""
