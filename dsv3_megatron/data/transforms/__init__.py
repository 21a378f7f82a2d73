"""What may happen to a document before or after encoding: each a function of its text and a seed, nothing else.

    fim.py        fill-in-the-middle                     combined_tokens.py  splits tokens that join punctuation and
    sentences.py  documents -> sentences, with Punkt                         line breaks
    keyed_random.py  a document's own random numbers
"""
