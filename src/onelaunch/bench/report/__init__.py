"""`onelaunch report`: what many records say, as one page of HTML or as Markdown."""
