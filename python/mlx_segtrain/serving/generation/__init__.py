"""Generates answers with one base model and many adapters.

engine.py    the thread that generates, and its schedule
mounting.py  the base model, mounted adapters, and the updates in its linear layers
requests.py  a request              pieces.py   sends pieces of an answer to its reader
grammars.py  formats of answers     metrics.py  counts for Prometheus
words.py     the bytes of tokens

mlx_segtrain.generation decodes the answers.
"""
