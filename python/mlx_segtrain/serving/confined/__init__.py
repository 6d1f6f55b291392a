"""Handles untrusted templates, tokenizers and data in processes that can be killed.

parent.py starts the processes and sends them commands; child.py is what they run.
"""
