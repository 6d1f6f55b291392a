"""Jobs: processes with a queue, whose news can be followed and outlive whatever is killed.

queue.py     who runs, and how it ends      kinds.py     what each kind of job is
store.py     rows of the database           eventlog.py  what a job says
worker.py    a job's process                pushing.py   what is sent to a hub
"""
