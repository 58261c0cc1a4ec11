"""Room 2: student folder -> bundle folder. Plug-ins are `to_*.py`."""
