"""Generates completions with one base model and many adapters.

engine.py    the thread that generates, and its schedule
mounting.py  the base model, mounted adapters, and the updates in its linear layers
requests.py  a request                  pieces.py   sends pieces of a completion to its reader
grammars.py  formats of completions     metrics.py  counts for Prometheus
words.py     the bytes of tokens

mlx_segtrain.generation does the decoding.
"""
