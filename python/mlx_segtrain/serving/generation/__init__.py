"""Answers of one base model with many adapters.

engine.py    the thread that generates, and whose turn it is
batching.py  requests that are decoded together    grammars.py  what an answer has to be
mounting.py  one base, adapters, and which of them is in its linear layers
decoding.py  logits to tokens, tokens to text      pieces.py    of an answer, to who reads it
words.py     the bytes of a token                  metrics.py   what there was, for Prometheus
"""
