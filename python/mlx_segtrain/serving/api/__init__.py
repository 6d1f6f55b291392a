"""HTTP: routes, what they take and answer, and who may call them.

guard.py     who may ask what, from where, and how much      brake.py   lines of the log
bodies.py    bodies of requests, counted and parsed          faults.py  what is wrong, in a sentence
routes.py    /api; forms.py: what it takes and answers
openai.py    /v1; openai_forms.py, openai_fields.py: what it takes, means and refuses
"""
