"""Runs what untrusted files make a library do, in processes that can be killed.

parent.py starts them and sends requests; child.py runs in them.
"""
