"""Generates answers in batches, for the server and for the rollouts of a training run.

decoding.py  chooses tokens from logits, and decodes them to text
batching.py  decodes several answers together
parts.py     splits an answer into reasoning, content and tool calls
rollouts.py  generates completions of prompts, in batches
"""
