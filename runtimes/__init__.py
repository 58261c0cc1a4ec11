"""Room 3: bundle folder -> images and figures. Plug-ins are `on_*.py`. No torch at import."""
