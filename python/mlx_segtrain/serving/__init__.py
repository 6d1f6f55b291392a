"""The server: jobs with live events, generation with adapters that are swapped, and the page.

A request comes in at the top and goes down:

    app.py       puts all of it together, and runs it
    guard.py     who may ask what, from where, and how much; which folders may be named
    api.py       /api: training, data, models, jobs; forms.py: what these take and answer
    service.py   what the API and the page both do
    jobs.py      the queue; store.py: its rows; eventlog.py: its news; worker.py: a job's process;
                 kinds.py: what each kind of job is
    openai.py    /v1: chat, completions, models, adapters; openai_forms.py: what these take and mean
    engine.py    the thread that generates, and whose turn it is; generation.py: pieces of an answer
    mounting.py  one base, adapters, and which of them is in its linears
    decoding.py  logits to tokens, tokens to text
    catalog.py   what lies on disk
    bodies.py    bodies of requests, counted and parsed; pools.py: threads for each kind of work
    confined.py  what files of strangers make a library do, in processes that can be killed:
                 confined_process.py
    opening.py   files that are checked where they are opened, against links that come later
    processes.py how processes of ours are started; pushing.py: what is sent to a hub
    sessions.py  what a browser shows in the place of the token; brake.py: wrong tokens, log lines
    page/        /finetune
"""
