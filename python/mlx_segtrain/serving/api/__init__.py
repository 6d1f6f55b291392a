"""HTTP: the routes, their requests and responses, and access control.

guard.py      checks access, origin and size       bodies.py    parses JSON bodies
faults.py     turns errors into sentences          brake.py     limits the log
routes.py     /api; its requests and responses are in forms.py
transfers.py  uploads and downloads                pages.py     files for browsers
openai.py     /v1; its requests and responses are in openai_forms.py, openai_fields.py,
              openai_tools.py and openai_responses.py (/v1/responses)
"""
