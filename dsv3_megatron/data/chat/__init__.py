"""Conversations for fine-tuning: from JSON lines to masked tokens on disk, and from these to packed samples.

To disk:  conversation.py  a line of JSON -> messages   template.py  messages -> text, and where the assistant's lie
          encoding.py      a block of lines -> ids and what counts of them, in a worker process
On disk:  masked.py        a dataset and its mask
Answers:  prompts.py       lines of JSON that end where an answer is to begin
Training: packing.py       which conversations share a sequence    packed_samples.py   packed conversations by number
"""
