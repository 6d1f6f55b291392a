"""The server: jobs with live events, generation with per-request adapters, and the page.

Each of these modules imports only modules listed below it (tests/test_rooms.py):

    app.py       creates the application and runs the server
    api/         /api and /v1: access, requests and responses; serves the page's files
    service.py   implements the API
    generation/  generates completions, with adapters
    jobs/        runs jobs, each in its own process
    catalog.py   lists models, data sets and adapters on disk
    confined/    handles untrusted files in processes that can be killed
    opening.py   checks files when they are opened
    roots.py     checks paths from clients
    pools.py     thread pools      searching.py  searches the hub
    settings.py  settings          sessions.py   browser sessions

page/ contains the web page at /finetune, which runs in the browser and uses /api and /v1.
"""
