"""Handles untrusted templates, tokenizers and data in processes that can be killed.

parent.py starts the processes, which run child.py, and sends them commands.
"""
