"""Parts of ``evaluate.py``: editors, the folder of images, scoring, and what is written."""
