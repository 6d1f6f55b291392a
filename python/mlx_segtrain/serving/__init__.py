"""The server: jobs with live events, generation with adapters that are swapped, and the page.

From the top down; each imports only what is below it (tests/test_rooms.py):

    app.py       puts all of it together, and runs it
    api/         /api and /v1: who may call them, what they take and answer; the page's files
    service.py   what the API does
    generation/  answers to prompts, with adapters
    jobs/        the queue, and the process of each job
    catalog.py   what lies on disk
    confined/    what untrusted files make a library do, in processes that can be killed
    opening.py   files that are checked where they are opened, against links that come later
    processes.py how processes of ours are started
    roots.py     which folders may be named
    settings.py, sessions.py (what a browser shows in place of the token),
    pools.py (threads for each kind of work), searching.py (searches of the hub)

page/ is /finetune: files for a browser, which are clients of /api and /v1.
"""
