"""Generates answers in batches, for the server and for the rollouts of a training run.

decoding.py  from logits to tokens, and from tokens to text
batching.py  decodes several answers together
parts.py     splits an answer into reasoning, tool calls and content
rollouts.py  generates the completions of prompts, several at a time
"""
