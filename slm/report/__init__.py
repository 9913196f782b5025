"""`slm report RUN [RUN …]`: one or several runs as one HTML page that opens without a network. No torch.

record.py reads a run's folder, charts.py draws (pure), sections.py says what of a run is shown and how, page.py puts the
page together; page.css and page.js go into it as they are.
"""
