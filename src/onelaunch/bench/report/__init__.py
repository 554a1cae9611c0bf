"""`onelaunch report`: many records as one page of HTML or as Markdown."""
