"""Answers of one model, many at a time: for the server and for the rollouts of a training run.

decoding.py  logits to tokens, tokens to text
batching.py  answers that are decoded together
parts.py     reasoning, calls of tools and the rest of an answer
rollouts.py  all answers to some prompts, within a number that run at once
"""
