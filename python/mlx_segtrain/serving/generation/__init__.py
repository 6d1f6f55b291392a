"""Answers of one base model with many adapters.

engine.py    the thread that generates, and whose turn it is
mounting.py  one base, adapters, and which of them is in its linear layers
grammars.py  what an answer has to be              pieces.py    of an answer, to who reads it
requests.py  an answer that a client waits for     metrics.py   what there was, for Prometheus
words.py     the bytes of a token

Answers are decoded by the room mlx_segtrain.generation.
"""
