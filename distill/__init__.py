"""Room 1: recipe and teacher folder -> student folder. Plug-ins are `by_*.py`."""
