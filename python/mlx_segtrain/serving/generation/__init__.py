"""Answers of one base model with adapters that are swapped.

engine.py    the thread that generates, and whose turn it is
mounting.py  one base, adapters, and which of them is in its linear layers
decoding.py  logits to tokens, tokens to text      pieces.py    of an answer, to who reads it
"""
