"""What untrusted files make a library do, in processes that can be killed.

parent.py starts them and asks; child.py is what runs in them.
"""
