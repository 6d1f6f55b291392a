"""Jobs: queued processes that outlive the server, and whose events clients can follow.

queue.py     starts jobs and follows them     kinds.py     declares the kinds of jobs
store.py     the database                     eventlog.py  the log of a job's events
worker.py    a job's process                  outputs.py   checks output folders
row.py       a job                            pushing.py   uploads to the hub
group.py     a job with several ranks         launcher.py, rank.py   its other processes
"""
