"""`python -m care`."""

from .cli import main

main()
