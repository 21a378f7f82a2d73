"""Text to tokens on disk, and tokens on disk to batches.

Nothing is imported here, so that preprocessing does not pay for torch: import the module that is needed.

Text:     reading/      files -> documents               corpus.py         the quickstart's corpus, from installed text
          tokenizer.py  byte-level BPE like DeepSeek-V3's    text_sample.py  a bounded sample of a corpus
Chat:     chat/         conversations -> masked tokens, and these -> packed samples, for fine-tuning
To disk:  transforms/   what may happen to a document    encoder.py        texts -> ids: gigatoken or tokenizers
          tokenizer_proof.py    in which texts the two part: of its parts the largest is character_classes.py;
                        fast_tokenizer.py loads gigatoken
          preprocess.py a job, from inputs to datasets   block_encoder.py  a piece of it, in a worker process
          pool.py       worker processes                 job.py            how far a job has come, for going on with it
          datatrove_step.py     the encoder as a step of datatrove's pipelines
On disk:  indexed.py    the .bin/.idx format, sidecars   indexed_writer.py writes it, in constant memory
          merge.py      datasets joined                  inspection.py     statistics and verification
          checksums.py  checksums of files by block, of checkpoints too
          hashed_files.py   files whose checksums are made while they are read and written
          proved_tokens.py  tokens, each block proved when it is first read
          signed_json.py    JSON with a checksum of itself  folder_checksums.py  checksums.json beside others' formats
          contents.py   hashes, lowest and highest id, sidecars against their files
Training: blend.py      --data-path, checks before a run datasets.py       which files, cut how, for which split
          order.py      which sample is n-th, computed   samples.py        .bin/.idx -> samples by number
          batches.py    samples -> Batch, with a position    document_ends.py  where packed documents end
          identity.py   what an order of samples follows from  current.py  the data that a run reads, and its place
          ngram.py      unigram and bigram baselines     rows.py           rows to be scored, of data or an array
Texts:    text_form.py  how a dataset's begin and end    special_tokens.py what a tokenizer puts around them
"""
